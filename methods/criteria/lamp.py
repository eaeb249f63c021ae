"""Layer-adaptive magnitude (LAMP). Lee et al. 2021, arXiv:2010.07611."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import channel_rows, get_layer
from .scoring import DataFreeTask


def lamp(
    model: nn.Module,
    task: DataFreeTask,
    layers: Sequence[str],
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Share of a channel in the energy of the layer's stronger ones (LAMP).

    score_c = |W_c|^2 / sum of |W_d|^2 over the channels d that are at least as strong as c (eq. 2
    of the paper with a channel in the place of a weight). Within a layer the order is that of the
    L2 norm; between layers the scores compare, and each layer's strongest channel has 1.

    Args:
        model: The dense model.
        task: Not used.
        layers: Names of the layers to score.
        generator: Not used.

    Returns:
        Layer name to scores in [0, 1], [out]. Of equal channels the first counts as the weaker.
    """
    scores = {}
    for name in layers:
        layer = get_layer(model, name)
        energy = channel_rows(layer, layer.weight.detach()).double().square().sum(1)
        ascending, order = energy.sort(stable=True)
        at_least = ascending.flip(0).cumsum(0).flip(0)
        shares = torch.where(at_least == 0, 0, ascending / at_least)  # a layer of zeros has none
        scores[name] = torch.empty_like(shares).scatter_(0, order, shares).float().cpu()
    return scores
