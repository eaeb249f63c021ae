"""A criterion: a function that scores the output channels of layers; higher means keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def largest_weight(
    model: nn.Module,
    task: Any,
    layers: Sequence[str],
    *,
    generator: torch.Generator,
    power: float = 1.0,
) -> dict[str, Tensor]:
    """The largest absolute weight of each channel.

    Args:
        model: The dense model; leave it as it is.
        task: The data that `needs` allows: `calibration_batches()` and `loss(output, target)`.
        layers: Names of convolutions and linear layers.
        generator: For what is drawn.
        power: An option: a keyword with a default, as in `{name: largest_weight, power: 2}`.

    Returns:
        Layer -> float32 scores on the CPU, [out_channels], finite and not negative.
    """
    scores = {}
    for name in layers:
        weight = model.get_submodule(name).weight.detach()
        scores[name] = weight.abs().flatten(1).amax(1).pow(power).float().cpu()
    return scores


largest_weight.needs = "nothing"  # or "images", or "labels"
largest_weight.comparable = True  # scores of different layers compare as they are
