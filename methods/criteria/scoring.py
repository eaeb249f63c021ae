"""What the criteria share: the task they need, a safe way to run the model, rows of channels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..names import nearest

Layer = nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear


class DataFreeTask(Protocol):
    """What a criterion that reads no data needs of a task: the shape of an image."""

    def example_input(self, batch_size: int = 1) -> Tensor:
        """A batch that the model accepts, [batch_size, C, H, W]; its values may be anything."""


class CalibrationTask(DataFreeTask, Protocol):
    """What a criterion needs of a task. Calibration batches are drawn from training data."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    def calibration_batches(self) -> list[tuple[Tensor, Tensor]]:
        """Fixed batches of images [B, C, H, W] and labels [B], on the model's device."""

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean loss of a batch, a scalar."""


@contextlib.contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, gradients on, every parameter frozen; all put back at the end.

    Frozen, because a criterion asks for the gradients it needs and no other. The `grad` fields
    are never written: take gradients with `torch.autograd.grad`.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


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
