"""Channel criteria: one paper a file. A criterion scores the output channels of layers.

A criterion is called as `f(model, task, layers, *, generator, **options)` and returns, for each
layer name, a float32 CPU tensor [out_channels] of finite scores >= 0; higher means keep. It leaves
the model as it was, bit for bit. Go through `score_channels`, which seeds and checks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..names import unknown_name
from ..options import check_options
from .fgp import fgp
from .magnitude import magnitude_l1, magnitude_l2
from .random import random
from .scoring import CalibrationTask, get_layer, num_channels
from .taylor import taylor

__all__ = [
    "CRITERIA",
    "CalibrationTask",
    "describe",
    "score_channels",
    "validate_options",
]

CRITERIA: dict[str, Callable[..., dict[str, Tensor]]] = {
    "random": random,
    "magnitude_l1": magnitude_l1,
    "magnitude_l2": magnitude_l2,
    "taylor": taylor,
    "fgp": fgp,
}


DRAWN = frozenset({"random"})
"""Criteria that draw their scores: each trial needs a draw of its own."""


def score_channels(
    name: str,
    model: nn.Module,
    task: CalibrationTask,
    layers: Sequence[str],
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Scores the output channels of `layers` by the criterion `name`.

    Depends on the arguments alone: the global random state is neither used nor changed.

    Args:
        name: A key of `CRITERIA`.
        model: The dense model, on the device of the task; left as it was, bit for bit.
        task: Gives the calibration batches and the loss.
        layers: Names of convolution or linear layers (Conv1d, Conv2d, ConvTranspose2d, Linear).
        seed: Decides everything random.
        options: The criterion's options.

    Returns:
        Layer name to scores, float32 on the CPU, [out_channels], finite, >= 0; higher means keep.

    Raises:
        ValueError: If the name, an option or a layer is unknown, or a score is not finite.
    """
    validate_options(name, options or {})
    widths = {layer: num_channels(get_layer(model, layer)) for layer in layers}
    with torch.random.fork_rng(devices=_cuda_devices(model)):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        scores = CRITERIA[name](model, task, layers, generator=generator, **(options or {}))
    assert list(scores) == list(widths), f"{name} must score every layer once, in order"
    for layer, values in scores.items():
        assert values.shape == (widths[layer],) and values.dtype == torch.float32, (
            name,
            layer,
        )
        if not values.isfinite().all():
            raise ValueError(
                f"`criterion` (={name!r}) must give finite scores: those of layer {layer!r} are "
                f"not, because a weight, an output or a gradient of the model is infinite or "
                f"NaN. Check the checkpoint and the data."
            )
        assert values.min() >= 0, (name, layer)
    return scores


def validate_options(name: str, options: Mapping[str, Any]) -> None:
    """Checks a criterion's name and options without running it.

    Raises:
        ValueError: If the criterion or an option is unknown, or a value is not allowed.
    """
    if name not in CRITERIA:
        raise ValueError(unknown_name("criterion", name, CRITERIA))
    check_options(name, CRITERIA[name], options, without=("generator",))


def describe(name: str) -> str:
    """One line about the criterion `name`."""
    validate_options(name, {})
    return (inspect.getdoc(CRITERIA[name]) or "").splitlines()[0]


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
