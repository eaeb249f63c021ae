"""First-order Taylor importance. Molchanov et al. 2019, arXiv:1906.10771."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import Layer, batch_norms_after, channel_rows, get_layer, num_channels
from .scoring import CalibrationTask, scoring


def taylor(
    model: nn.Module,
    task: CalibrationTask,
    layers: Sequence[str],
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """First-order Taylor importance: sum over a channel's parameters of (w dL/dw)^2.

    score_c = mean over calibration batches of the sum over w in c of (w dL/dw)^2, with L the mean
    loss of the batch: squared batch by batch, then averaged (Molchanov et al. 2019, eq. 8 and
    section 3.2), so scores depend on the batch size. The parameters of a channel are its weights,
    its bias, and scale and shift of the batch norm that takes the layer's output.

    Args:
        model: The dense model; scored in evaluation mode and left as it was.
        task: Gives the calibration batches and the loss.
        layers: Names of the layers to score.
        generator: Not used.

    Returns:
        Layer name to scores, [out]; zero where the loss does not depend on the layer.
    """
    batches = task.calibration_batches()
    with scoring(model):
        norms = batch_norms_after(model, layers, batches[0][0][:1].clone())
        owned = {name: _parameters(get_layer(model, name), norms[name]) for name in layers}
        wanted = [parameter for parameters in owned.values() for parameter in parameters]
        for parameter in wanted:
            parameter.requires_grad_(True)
        scores = {name: torch.zeros(num_channels(get_layer(model, name))) for name in layers}
        for images, target in batches:
            loss = task.training_loss(model, images.clone(), target)  # it may change them in place
            gradients = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
            for name, parameters in owned.items():
                layer = get_layer(model, name)
                for parameter in parameters:
                    gradient = next(gradients)
                    if gradient is not None:
                        scores[name] += _squares(layer, parameter, gradient) / len(batches)
    return scores


def _parameters(layer: Layer, norms: Sequence[_BatchNorm]) -> list[Tensor]:
    tensors = [layer.weight, layer.bias]
    tensors += [tensor for norm in norms for tensor in (norm.weight, norm.bias)]
    return [tensor for tensor in tensors if tensor is not None]


def _squares(layer: Layer, parameter: Tensor, gradient: Tensor) -> Tensor:
    """Sum of (w g)^2 for each channel, [out], on the CPU."""
    product = (parameter.detach().float() * gradient.float()).square()
    if product.ndim > 1:
        product = channel_rows(layer, product).sum(1)
    return product.cpu()
