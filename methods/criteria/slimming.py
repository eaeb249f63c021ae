"""Batch-norm scale of a channel. Liu et al. 2017 (network slimming), arXiv:1708.06519."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import batch_norms_after, channel_rows, get_layer
from .scoring import DataFreeTask, scoring


def slimming(
    model: nn.Module,
    task: DataFreeTask,
    layers: Sequence[str],
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Size of a channel's batch-norm scale, |gamma| (slimming).

    The batch norm is the one that takes the layer's output as it is. A layer without one (or
    whose has no scale) is scored by the L2 norm of the channel's weights: |gamma| is the standard
    deviation that a channel has behind its batch norm, and the L2 norm is the one that it has
    when its inputs are uncorrelated and of unit variance.

    Args:
        model: The dense model; run once, in evaluation mode, and left as it was.
        task: Gives the shape of an image.
        layers: Names of the layers to score.
        generator: Not used.

    Returns:
        Layer name to scores, [out]: the mean over the norms of a layer that has several.
    """
    with scoring(model):
        norms = batch_norms_after(model, layers, task.example_input(1).clone())
    scores = {}
    for name in layers:
        scales = [norm.weight.detach().abs() for norm in norms[name] if norm.weight is not None]
        if scales:
            values = torch.stack(scales).float().mean(0)
        else:
            layer = get_layer(model, name)
            values = torch.linalg.vector_norm(
                channel_rows(layer, layer.weight.detach()).float(), dim=1
            )
        scores[name] = values.cpu()
    return scores
