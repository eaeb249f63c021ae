"""Random scores: the control that every criterion must beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import get_layer, num_channels
from .scoring import DataFreeTask


def random(
    model: nn.Module,
    task: DataFreeTask,
    layers: Sequence[str],
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Uniform random scores: the control that every other criterion must beat.

    Args:
        model: The dense model.
        task: Not used.
        layers: Names of the layers to score.
        generator: CPU generator; the only source of the scores.

    Returns:
        Layer name to scores in [0, 1), [out].
    """
    return {
        name: torch.rand(num_channels(get_layer(model, name)), generator=generator)
        for name in layers
    }
