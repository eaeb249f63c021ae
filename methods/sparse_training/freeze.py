"""Keeps the redundant channels as they are while the others train (DSD, eqs. 13-14)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import Layer, batch_norms_after, channel_factors
from ..trace import evaluating

Freeze = Literal["exact", "grad_zero"]
FreezeScope = Literal["bn", "filter"]


class Freezer:
    """Steps an SGD optimizer while some elements of its parameters stay.

    Args:
        optimizer: With momentum and weight decay, as it is.
        frozen: Parameter to what stays of it: bool, True where frozen, of a shape that broadcasts
            to the parameter's.
        freeze: `exact` puts values back after the step and zeroes their momentum, so that they
            stay bit by bit; `grad_zero` zeroes their gradients alone, which momentum and weight
            decay still move.
    """

    def __init__(
        self, optimizer: torch.optim.SGD, frozen: Mapping[Tensor, Tensor], freeze: Freeze
    ) -> None:
        self._optimizer, self._freeze = optimizer, freeze
        self._parameters: list[Tensor] = list(frozen)
        self._keep = [(~mask).to(p.dtype) for p, mask in frozen.items()]
        self._values = [p.detach() * mask for p, mask in frozen.items()]

    @torch.no_grad()
    def step(self) -> None:
        """One step of the optimizer, on the gradients that are there."""
        if self._freeze == "grad_zero":
            torch._foreach_mul_([_grad(p) for p in self._parameters], self._keep)
            self._optimizer.step()
            return
        self._optimizer.step()
        torch._foreach_mul_(self._parameters, self._keep)
        torch._foreach_add_(self._parameters, self._values)
        if self._optimizer.defaults["momentum"]:
            state = self._optimizer.state
            buffers: list[Tensor] = [state[p]["momentum_buffer"] for p in self._parameters]
            torch._foreach_mul_(buffers, self._keep)


def frozen_parts(
    norms: Mapping[str, _BatchNorm],
    redundant: Sequence[Tensor],
    producers: Mapping[str, Sequence[Layer]],
) -> dict[Tensor, Tensor]:
    """What stays of each parameter when channels are frozen.

    Args:
        norms: Name to batch norm.
        redundant: The channels to freeze in each, in the same order, bool [channels].
        producers: Name to the layers whose filters and biases are frozen with the norm's channels.

    Returns:
        Parameter to True where it is frozen, broadcasting to the parameter's shape.
    """
    frozen: dict[Tensor, Tensor] = {}

    def add(parameter: Tensor | None, mask: Tensor) -> None:
        if parameter is not None and parameter.requires_grad:
            frozen[parameter] = frozen[parameter] | mask if parameter in frozen else mask

    for (name, norm), mask in zip(norms.items(), redundant, strict=True):
        add(norm.weight, mask)
        add(norm.bias, mask)
        for layer in producers.get(name, ()):
            add(layer.weight, channel_factors(layer, mask))
            add(layer.bias, mask)
    return frozen


def producers_of(
    model: nn.Module, norms: Mapping[str, _BatchNorm], images: Tensor
) -> dict[str, list[Layer]]:
    """The layers whose output each batch norm takes as it is, found by running `images`.

    Raises:
        ValueError: If a norm takes no layer's output.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Layer)}
    with evaluating(model):
        after = batch_norms_after(model, list(layers), images)
    found = {
        name: [layers[layer] for layer, taken in after.items() if norm in taken]
        for name, norm in norms.items()
    }
    for name, producers in found.items():
        if not producers:
            raise ValueError(
                f"`freeze_scope` (=filter) must find the layer in front of each batch norm: what "
                f"{name} takes is no layer's output. Use `bn`, or leave {name} out of `norms`."
            )
    return found


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
