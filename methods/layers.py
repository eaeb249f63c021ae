"""Layers with output channels: finding them, their channels as rows, their batch norms."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .names import nearest

Layer = nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear


def get_layer(model: nn.Module, name: str) -> Layer:
    """The layer called `name`.

    Raises:
        ValueError: If there is none, or it has no output channels to score.
    """
    modules = dict(model.named_modules())
    if isinstance(layer := modules.get(name), Layer):
        return layer
    known = [n for n, module in modules.items() if isinstance(module, Layer)]
    raise ValueError(
        f"`layers` (={name!r}) must name a convolution or linear layer of the model: "
        f"{'it is a ' + type(layer).__name__ if layer else 'the model has no such module'}. "
        + (nearest(name, known) or f"Use one of {known[:8]}.")
    )


def num_channels(layer: Layer) -> int:
    """Number of output channels (output features of a linear layer)."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def channel_rows(layer: Layer, weight: Tensor) -> Tensor:
    """A tensor shaped like the layer's weight as one row an output channel, [out, rest]."""
    if isinstance(layer, nn.ConvTranspose2d):  # [in, out / groups, kh, kw]
        grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])
        return grouped.transpose(1, 2).reshape(layer.out_channels, -1)
    return weight.flatten(1)


def channel_factors(layer: Layer, factors: Tensor) -> Tensor:
    """One factor an output channel, [out], shaped to multiply the layer's weight."""
    if isinstance(layer, nn.ConvTranspose2d):  # [in, out / groups, kh, kw]
        inputs = layer.in_channels // layer.groups
        grouped = factors.reshape(layer.groups, 1, -1).expand(-1, inputs, -1)
        return grouped.reshape(layer.in_channels, -1, 1, 1)
    return factors.reshape(-1, *[1] * (layer.weight.ndim - 1))


def batch_norms_after(
    model: nn.Module, layers: Sequence[str], images: Tensor
) -> dict[str, list[_BatchNorm]]:
    """The batch norms that take a layer's output as it is, found by running `images`.

    One behind a concatenation or an addition belongs to several layers and is left out.
    """
    outputs: list[tuple[str, Tensor]] = []  # the tensors are held, so their identity is unique
    found: dict[str, list[_BatchNorm]] = {name: [] for name in layers}

    def match(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, _BatchNorm)
        for name, output in outputs:
            if output is args[0] and module not in found[name]:
                found[name].append(module)

    with contextlib.ExitStack() as stack:
        for name in layers:

            def note(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
                outputs.append((name, output))

            handle = get_layer(model, name).register_forward_hook(note)
            stack.callback(handle.remove)
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                stack.callback(module.register_forward_pre_hook(match).remove)
        with torch.no_grad():
            model(images)
    return found
