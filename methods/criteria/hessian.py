"""Diagonal Hessian of the loss (optimal brain damage). LeCun et al. 1989."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import Layer, batch_norms_after, channel_rows, get_layer, num_channels
from ..outputs import main_output
from .scoring import CalibrationTask, check_batch, scoring

CHUNK = 16  # images whose own gradients are in memory at once

Calls = list[tuple[Tensor, Tensor]]  # of a module: its input and the gradient of its output


def hessian(
    model: nn.Module,
    task: CalibrationTask,
    layers: Sequence[str],
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Loss that a channel's parameters cost by second order: sum of w^2 h (optimal brain damage).

    score_c = sum over w in c of w^2 h_w, where h_w = mean over images of (dL/dw)^2, L the loss of
    the image alone: the diagonal of the Fisher information for the diagonal of the Hessian. The
    parameters of a channel are its weights, its bias, and scale and shift of the batch norm that
    takes the layer's output, as in `taylor`; the factor 1/2 is left out.

    One forward and backward pass a calibration batch gives the gradients of all layers' outputs;
    in evaluation mode images do not mix, so each image's own parameter gradients follow from them
    layer by layer.

    Args:
        model: The dense model; scored in evaluation mode and left as it was.
        task: Gives the calibration batches and the loss.
        layers: Names of the layers to score.
        generator: Not used.

    Returns:
        Layer name to scores, [out]; zero where the loss does not depend on the layer.

    Raises:
        ValueError: If a layer mixes the images of a batch.
    """
    batches = task.calibration_batches()
    num_images = sum(len(images) for images, _ in batches)
    with scoring(model):
        norms = batch_norms_after(model, layers, batches[0][0][:1].clone())
        owned: dict[str, list[Layer | _BatchNorm]] = {
            name: [get_layer(model, name), *norms[name]] for name in layers
        }
        scores = {name: torch.zeros(num_channels(get_layer(model, name))) for name in layers}
        for images, target in batches:
            calls: dict[nn.Module, Calls] = {m: [] for ms in owned.values() for m in ms}
            with _recorded(calls, len(images)):
                source = images.clone().requires_grad_()
                logits = main_output(model(source.clone()))  # changed in place, perhaps
            losses = [task.loss(logits[i : i + 1], target[i : i + 1]) for i in range(len(logits))]
            torch.autograd.grad(torch.stack(losses).sum(), source)
            for name, modules in owned.items():
                for module in modules:
                    scores[name] += _cost(module, calls[module]) / num_images
    return scores


@contextlib.contextmanager
def _recorded(calls: Mapping[nn.Module, Calls], num_images: int) -> Iterator[None]:
    """Has `calls` filled by the backward pass of a forward pass that is run in the context."""

    def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        check_batch(type(module).__name__, args[0], num_images)
        entry = args[0].detach()  # not changed in place later, or the model could not be trained
        if output.requires_grad:
            output.register_hook(lambda gradient: calls[module].append((entry, gradient)))  # type: ignore[no-untyped-call]

    with contextlib.ExitStack() as stack:
        for module in calls:
            stack.callback(module.register_forward_hook(watch).remove)
        yield


def _cost(module: Layer | _BatchNorm, calls: Calls) -> Tensor:
    """Sum of (w g)^2 over the images and over each channel's parameters in a module, [out]."""
    of_weight = _scale_gradients if isinstance(module, _BatchNorm) else _weight_gradients
    kinds: dict[str, Callable[..., Tensor]] = {"weight": of_weight, "bias": _shift_gradients}
    total = torch.zeros(())
    for start in range(0, len(calls[0][0]) if calls else 0, CHUNK):
        chunk = [(x[start : start + CHUNK], g[start : start + CHUNK]) for x, g in calls]
        for kind, gradients in kinds.items():
            parameter = getattr(module, kind)
            if parameter is None:
                continue
            own = torch.stack([gradients(module, x, g) for x, g in chunk]).sum(0)
            squares = parameter.detach().float().square() * own.float().square().sum(0)
            if not isinstance(module, _BatchNorm) and kind == "weight":
                squares = channel_rows(module, squares).sum(1)
            total = total + squares.cpu()
    return total


def _weight_gradients(layer: Layer, entry: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of a layer's weight for each image, [B, *weight.shape]."""
    batch, shape = len(entry), layer.weight.shape
    if isinstance(layer, nn.Linear):
        return gradient.reshape(batch, -1, shape[0]).mT @ entry.reshape(batch, -1, shape[1])
    if isinstance(layer, nn.ConvTranspose2d):  # a convolution from its output to its input
        maps, windows = entry, _windows(layer, gradient, layer.padding)
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(entry, layer._reversed_padding_repeated_twice, mode=mode)
        maps, windows = gradient, _windows(layer, padded, 0)
    maps = maps.reshape(batch, layer.groups, -1, windows.shape[-1])
    windows = windows.reshape(batch, layer.groups, -1, windows.shape[-1])
    return (maps @ windows.mT).reshape(batch, *shape)


def _windows(layer: Layer, maps: Tensor, padding: Any) -> Tensor:
    """What the kernel sees at each of its positions, [B, channels x kernel size, positions]."""
    shape: list[Any] = [layer.kernel_size, layer.dilation, padding, layer.stride]
    if maps.ndim == 3:  # as one row of pixels; already padded
        maps, shape = maps[:, :, None], [(1, *size) if size else 0 for size in shape]
    return F.unfold(maps, *shape)


def _scale_gradients(norm: _BatchNorm, entry: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of a batch norm's scale for each image, [B, channels]."""
    alone = norm.running_mean is None
    normal = F.batch_norm(
        entry, norm.running_mean, norm.running_var, None, None, alone, 0, norm.eps
    )
    return _shift_gradients(norm, entry, gradient * normal)


def _shift_gradients(module: Layer | _BatchNorm, entry: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of a bias or shift for each image, [B, channels]."""
    if isinstance(module, nn.Linear):
        return gradient.reshape(len(gradient), -1, gradient.shape[-1]).sum(1)
    return gradient.reshape(*gradient.shape[:2], -1).sum(2)
