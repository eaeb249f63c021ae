"""Attributions of a loss to the outputs of layers, all layers at once, for any model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BatchLoss = Callable[[nn.Module, Any, Any], Tensor | Mapping[str, Tensor]]
Attributions = dict[str, list[Tensor]]  # layer -> one tensor, shaped as its output, a call
Draw = tuple[Tensor, Tensor, Tensor]  # inputs [B, C, H, W], baselines [B, C, H, W], share [B]


def grad_x_act(
    model: nn.Module,
    loss: BatchLoss,
    modules: Mapping[str, nn.Module],
    images: Any,
    target: Any,
) -> Attributions:
    """dL/dA * A of each layer, for one batch (captum's LayerGradientXActivation)."""
    return {
        name: [call.gradient * call.value for call in calls if call.gradient is not None]
        for name, calls in _run(model, loss, modules, images, target, backward=True).items()
    }


def gradient_shap(
    model: nn.Module,
    loss: BatchLoss,
    modules: Mapping[str, nn.Module],
    target: Any,
    draws: Sequence[Draw],
) -> Attributions:
    """Mean over draws of dL/dA(mix) * (A(input) - A(baseline)) (captum's LayerGradientShap).

    Args:
        model: In eval mode.
        loss: Of a batch.
        modules: The layers.
        target: Of the batch.
        draws: Inputs, baselines, and the share [B] of the input in the mix.

    Returns:
        Layer name to attributions, one tensor a call.

    Raises:
        ValueError: If a layer's output has another shape for the baseline than for the input.
    """
    sums: Attributions = {name: [] for name in modules}
    for inputs, starts, share in draws:
        share = share.view(-1, *[1] * (inputs.ndim - 1))
        mixed = share * inputs + (1 - share) * starts
        ends, origins, mixes = (
            _run(model, loss, modules, images, target, backward=images is mixed)
            for images in (inputs, starts, mixed)
        )
        for name in modules:
            shapes = [[c.value.shape for c in run[name]] for run in (ends, origins, mixes)]
            if shapes[0] != shapes[1] or shapes[0] != shapes[2]:
                raise ValueError(
                    f"`layers` (={name}) must return one shape for all images: gradient_shap "
                    "subtracts its outputs. Leave it out, or use grad_x_act."
                )
            parts = [
                torch.zeros_like(m.value)
                if m.gradient is None
                else m.gradient * (end.value - origin.value) / len(draws)
                for end, origin, m in zip(ends[name], origins[name], mixes[name], strict=True)
            ]
            known = sums[name] or [torch.zeros_like(part) for part in parts]
            sums[name] = [a + b for a, b in zip(known, parts, strict=True)]
    return sums


@dataclass
class _Output:
    """A layer's output in one call. The backward pass fills in dL/dA."""

    value: Tensor
    gradient: Tensor | None = None

    def receive(self, gradient: Tensor) -> None:
        self.gradient = gradient


def _run(
    model: nn.Module,
    loss: BatchLoss,
    modules: Mapping[str, nn.Module],
    images: Any,
    target: Any,
    *,
    backward: bool,
) -> dict[str, list[_Output]]:
    """The layers' outputs for a batch, with their gradients after a backward pass."""
    parts = [images] if isinstance(images, Tensor) else list(images)  # detectors take lists
    sources = [part.detach().clone().requires_grad_(backward) for part in parts]
    inputs: Any = [source.clone() for source in sources]  # which the model may change in place
    with _recorded(modules) as outputs, torch.set_grad_enabled(backward):
        result = loss(model, inputs[0] if isinstance(images, Tensor) else inputs, target)
        if backward:
            total = (
                torch.stack(list(result.values())).sum() if isinstance(result, Mapping) else result
            )
            if not total.requires_grad:
                raise ValueError(
                    f"`model` (={type(model).__name__}) must be differentiable: its loss has no "
                    "gradient with respect to the images. Remove no_grad or detach from its "
                    "forward, or use layer_l1."
                )
            torch.autograd.grad(total, sources, allow_unused=True)
    return outputs


@contextmanager
def _recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[_Output]]]:
    outputs: dict[str, list[_Output]] = {name: [] for name in modules}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"`layers` (={name}) must return one tensor, and this one returns a "
                    f"{type(output).__name__}: it has no activation to score. Leave it out."
                )
            # A copy: what follows may overwrite it. The gradient that arrives is the one with
            # respect to the values that the tensor has now.
            noted = _Output(output.detach().clone())
            outputs[name].append(noted)
            if output.requires_grad:
                output.register_hook(noted.receive)  # type: ignore[no-untyped-call]

        return hook

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(note(name)).remove)
        yield outputs
