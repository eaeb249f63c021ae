"""Channel criteria: one paper a file. A criterion scores the output channels of layers.

A criterion is called as `f(model, task, layers, *, generator, **options)` and returns, for each
layer name, a float32 CPU tensor [out_channels] of finite scores >= 0; higher means keep. It leaves
the model as it was, bit for bit. Go through `score_channels`, which seeds and checks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..layers import get_layer, num_channels
from ..names import unknown_name
from ..options import check_options
from ..plugins import plugins
from ..seeding import seeded
from ..sparse_training import RUN_ARGUMENTS, SPARSE_TRAINING
from .blockwipg import blockwipg
from .fgp import fgp
from .fpgm import fpgm
from .group_norm import group_norm
from .hessian import hessian
from .hrank import hrank
from .lamp import lamp
from .magnitude import magnitude_l1, magnitude_l2
from .random import random
from .scoring import CalibrationTask, DataFreeTask
from .slimming import slimming
from .synflow import synflow
from .taylor import taylor

__all__ = [
    "COMPARABLE",
    "CRITERIA",
    "DRAWN",
    "NEEDS",
    "CalibrationTask",
    "DataFreeTask",
    "criterion_names",
    "describe",
    "is_comparable",
    "known_methods",
    "needs",
    "score_channels",
    "validate_options",
]

CRITERIA: dict[str, Callable[..., dict[str, Tensor]]] = {
    "random": random,
    "magnitude_l1": magnitude_l1,
    "magnitude_l2": magnitude_l2,
    "lamp": lamp,
    "group_norm": group_norm,
    "slimming": slimming,
    "fpgm": fpgm,
    "synflow": synflow,
    "blockwipg": blockwipg,
    "hrank": hrank,
    "fgp": fgp,
    "taylor": taylor,
    "hessian": hessian,
}

NEEDS: dict[str, Literal["nothing", "images", "labels"]] = {
    **dict.fromkeys(CRITERIA, "nothing"),
    "hrank": "images",
    "fgp": "images",  # and labels with the option presence = label
    "taylor": "labels",
    "hessian": "labels",
}
"""What a criterion reads of the calibration split. All need the shape of an image."""

DRAWN = frozenset({"random"})
"""Criteria that draw their scores: each trial needs a draw of its own."""

COMPARABLE = frozenset(
    {"random", "lamp", "slimming", "synflow", "taylor", "hessian", *SPARSE_TRAINING}
)
"""Methods whose scores compare between layers as they are; others need dividing by their mean."""


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
    if name not in criterion_names():
        raise ValueError(unknown_name("criterion", name, criterion_names()))
    validate_options(name, options or {})
    widths = {layer: num_channels(get_layer(model, layer)) for layer in layers}
    with seeded(seed):
        generator = torch.Generator().manual_seed(seed)
        scores: dict[str, Tensor] = _method(name)(
            model, task, layers, generator=generator, **(options or {})
        )
    _check_form(name, scores, widths)
    for layer, values in scores.items():
        if not values.isfinite().all():
            raise ValueError(
                f"`criterion` (={name!r}) must give finite scores: those of layer {layer!r} are "
                f"not, because a weight, an output or a gradient of the model is infinite or "
                f"NaN. Check the checkpoint and the data."
            )
    return scores


def _check_form(name: str, scores: Mapping[str, Tensor], widths: Mapping[str, int]) -> None:
    """What every criterion must return, a plug-in's too."""
    if list(scores) != list(widths):
        raise ValueError(
            f"`criterion` (={name!r}) must score every layer once, in order: it scored "
            f"{len(scores)} of {len(widths)}. Correct the criterion."
        )
    for layer, values in scores.items():
        form = (values.dtype, tuple(values.shape), values.device.type)
        if form != (torch.float32, (widths[layer],), "cpu") or bool((values < 0).any()):
            raise ValueError(
                f"`criterion` (={name!r}) must give float32 scores >= 0 on the CPU, "
                f"[{widths[layer]}] for layer {layer!r}: it gave {values.dtype} "
                f"{list(values.shape)} on {values.device}. Correct the criterion."
            )


def known_methods() -> tuple[str, ...]:
    """Names of all methods that decide about channels: criteria, sparse training, plug-ins."""
    return (*_OWN, *plugins("criteria", _OWN))


def criterion_names() -> tuple[str, ...]:
    """Ours, and those of installed plug-ins."""
    return (*CRITERIA, *plugins("criteria", _OWN))


def needs(name: str) -> str:
    """What a criterion reads: nothing, images or labels. A plug-in says it in `needs`."""
    return NEEDS.get(name) or str(getattr(_method(name), "needs", "labels"))


def is_comparable(name: str | None) -> bool:
    """Whether its scores compare between layers. A plug-in says it in `comparable`."""
    if name is None or name in _OWN:
        return name in COMPARABLE
    return bool(getattr(_method(name), "comparable", False))


def validate_options(name: str, options: Mapping[str, Any]) -> None:
    """Checks the name and the options of one of `known_methods` without running it.

    Raises:
        ValueError: If the method or an option is unknown, or a value is not allowed.
    """
    without = RUN_ARGUMENTS if name in SPARSE_TRAINING else ("generator",)
    check_options(name, _method(name), options, without=without)


def describe(name: str) -> str:
    """One line about one of `known_methods`."""
    return (inspect.getdoc(_method(name)) or "").splitlines()[0]


def _method(name: str) -> Callable[..., Any]:
    if name in _OWN:
        return _OWN[name]
    offered = plugins("criteria", _OWN)
    if name not in offered:
        raise ValueError(unknown_name("criterion", name, known_methods()))
    method: Callable[..., Any] = offered[name].load()
    return method


_OWN: dict[str, Callable[..., Any]] = {**CRITERIA, **SPARSE_TRAINING}
