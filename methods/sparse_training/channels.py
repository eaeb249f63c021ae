"""The scales and shifts of several batch norms as flat vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..names import nearest


class Channels:
    """The channels of batch norms, one after the other: n in all.

    A training step then costs a handful of operations, whatever the number of norms.

    Args:
        model: Holds the norms.
        names: Names of batch norms of the model.

    Raises:
        ValueError: If there is no name, or one is repeated or is no trainable batch norm.

    Attributes:
        norms: Name to module.
        widths: Channels of each.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"`norms` (={list(names)}) must name each batch norm once, and at least one: "
                "sparse training decides on their channels. Correct the names."
            )
        modules = dict(model.named_modules())
        self.norms = {name: _batch_norm(modules, name) for name in names}
        self.widths = [norm.num_features for norm in self.norms.values()]
        self._scales = [norm.weight for norm in self.norms.values()]
        self._shifts = [norm.bias for norm in self.norms.values()]

    @property
    def device(self) -> torch.device:
        """Where the scales live."""
        return self._scales[0].device

    def tau(self) -> Tensor:
        """The scales, a copy, [n]."""
        return torch.cat([scale.detach() for scale in self._scales])

    def beta(self) -> Tensor:
        """The shifts, a copy, [n]."""
        return torch.cat([shift.detach() for shift in self._shifts])

    def tau_grad(self) -> Tensor:
        """The gradients of the scales, a copy, [n].

        Raises:
            ValueError: If a scale has none.
        """
        return torch.cat(self._grads(self._scales))

    def add_to_tau_grad(self, values: Tensor) -> None:
        """Adds `values`, [n], to the gradients of the scales."""
        torch._foreach_add_(self._grads(self._scales), self.split(values))

    def add_to_beta_grad(self, values: Tensor) -> None:
        """Adds `values`, [n], to the gradients of the shifts."""
        torch._foreach_add_(self._grads(self._shifts), self.split(values))

    def split(self, values: Tensor) -> list[Tensor]:
        """One part of `values`, [n], for each norm."""
        return list(torch.split(values, self.widths))

    def _grads(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        grads = []
        for name, parameter in zip(self.norms, parameters, strict=True):
            if parameter.grad is None:
                raise ValueError(
                    f"`norms` (={name}) must name a batch norm that the loss depends on: it has "
                    "no gradient. Leave it out."
                )
            grads.append(parameter.grad)
        return grads


def _batch_norm(modules: dict[str, nn.Module], name: str) -> _BatchNorm:
    norm = modules.get(name)
    known = [n for n, module in modules.items() if isinstance(module, _BatchNorm)]
    if not isinstance(norm, _BatchNorm):
        reason = f"it is a {type(norm).__name__}" if norm else "the model has no such module"
    elif any(p is None or not p.requires_grad for p in (norm.weight, norm.bias)):
        reason = "its scale and shift cannot be trained"
    else:
        return norm
    raise ValueError(
        f"`norms` (={name!r}) must name a batch norm with a trainable scale and shift: {reason}. "
        + (nearest(name, [n for n in known if n != name]) or f"Use some of {known[:8]}.")
    )
