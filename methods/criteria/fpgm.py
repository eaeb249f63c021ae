"""Filter pruning by geometric median (FPGM). He et al. 2019, arXiv:1811.00250."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import channel_rows, get_layer
from .scoring import DataFreeTask


def fpgm(
    model: nn.Module,
    task: DataFreeTask,
    layers: Sequence[str],
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Distance of a channel's filter from all others of its layer (FPGM).

    score_c = sum over the channels d of |W_c - W_d|, the Euclidean distance of the flattened
    filters (eqs. 5 and 6 of the paper): the filter nearest to the geometric median can best be
    replaced by the others.

    Args:
        model: The dense model.
        task: Not used.
        layers: Names of the layers to score.
        generator: Not used.

    Returns:
        Layer name to scores, [out]. The bias is not counted.
    """
    scores = {}
    for name in layers:
        layer = get_layer(model, name)
        rows = channel_rows(layer, layer.weight.detach()).double()
        # by matrix product: in float64 it is still exact to float32, and it is fast
        distances = torch.cdist(rows, rows, compute_mode="use_mm_for_euclid_dist")
        scores[name] = distances.sum(1).float().cpu()
    return scores
