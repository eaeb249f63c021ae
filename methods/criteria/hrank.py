"""Rank of a channel's feature maps (HRank). Lin et al. 2020, arXiv:2002.10179."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from ..layers import get_layer, num_channels
from ..options import Bounds
from .features import find_activations, observed
from .scoring import CalibrationTask, scoring


def hrank(
    model: nn.Module,
    task: CalibrationTask,
    layers: Sequence[str],
    *,
    generator: torch.Generator,
    num_batches: Annotated[int, Bounds(1)] = 5,
    feature_point: Literal["conv", "act"] = "act",
) -> dict[str, Tensor]:
    """Mean matrix rank of a channel's feature maps (HRank). Slow: one SVD a map.

    score_c = mean over images of rank(F_c), F_c the [H, W] map of the image (eq. 4 of the paper).

    Args:
        model: The dense model; scored in evaluation mode and left as it was.
        task: Gives the calibration batches.
        layers: Names of the layers to score.
        generator: Not used.
        num_batches: Use the first batches, at most this many.
        feature_point: F is the layer's output, or the output of the batch norm and activation
            that follow it (as in the authors' code: before them nearly every map has full rank).

    Returns:
        Layer name to scores, [out]: at most 1 where a map is one row of pixels or one number;
        zero where a layer is not called.
    """
    batches = task.calibration_batches()[:num_batches]
    with scoring(model), torch.no_grad():
        ranks = {name: torch.zeros(num_channels(get_layer(model, name))) for name in layers}
        num_maps = dict.fromkeys(layers, 0)

        def observe(name: str, feature: Tensor) -> None:
            if isinstance(get_layer(model, name), nn.Linear):
                feature = feature.movedim(-1, 1)
            ranks[name] += _ranks(feature.detach()).sum(0).cpu()
            num_maps[name] += len(feature)

        activations = {}
        if feature_point == "act":
            activations = find_activations(model, layers, batches[0][0][:1].clone())
        for images, _ in batches:
            with observed(model, layers, observe, activations):
                model(images.clone())  # which the model may change in place
    return {name: total / max(num_maps[name], 1) for name, total in ranks.items()}


def _ranks(feature: Tensor) -> Tensor:
    """Rank of each map of a feature [B, C, ...], as float32 [B, C]; NaN where it is not finite."""
    pixels = feature.shape[2:]
    maps = feature.float().reshape(*feature.shape[:2], *([1] * (2 - len(pixels))), *pixels)
    finite = maps.isfinite().all(-1).all(-1)
    ranks = torch.linalg.matrix_rank(torch.where(finite[..., None, None], maps, 0)).float()
    return torch.where(finite, ranks, torch.nan)
