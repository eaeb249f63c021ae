"""Magnitude of a channel's weights. Li et al. 2017, arXiv:1608.08710."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import channel_rows, get_layer
from .scoring import DataFreeTask


def magnitude_l1(
    model: nn.Module,
    task: DataFreeTask,
    layers: Sequence[str],
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """L1 norm of each channel's weights: sum of |w| (Li et al. 2017).

    Args:
        model: The dense model.
        task: Not used.
        layers: Names of the layers to score.
        generator: Not used.

    Returns:
        Layer name to scores, [out]. The bias is not counted.
    """
    return _norms(model, layers, order=1)


def magnitude_l2(
    model: nn.Module,
    task: DataFreeTask,
    layers: Sequence[str],
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """L2 norm of each channel's weights: square root of the sum of w^2.

    Args:
        model: The dense model.
        task: Not used.
        layers: Names of the layers to score.
        generator: Not used.

    Returns:
        Layer name to scores, [out]. The bias is not counted.
    """
    return _norms(model, layers, order=2)


def _norms(model: nn.Module, layers: Sequence[str], order: int) -> dict[str, Tensor]:
    scores = {}
    for name in layers:
        layer = get_layer(model, name)
        rows = channel_rows(layer, layer.weight.detach()).float()
        scores[name] = torch.linalg.vector_norm(rows, ord=order, dim=1).cpu()
    return scores
