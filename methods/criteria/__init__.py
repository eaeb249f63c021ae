"""Channel criteria: one paper a file. A criterion scores the output channels of layers.

A criterion is called as `f(model, task, layers, *, generator, **options)` and returns, for each
layer name, a float32 CPU tensor [out_channels] of finite scores >= 0; higher means keep. It leaves
the model as it was, bit for bit. Go through `score_channels`, which seeds and checks.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

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
        raise ValueError(
            f"`criterion` (={name!r}) must be one of {', '.join(CRITERIA)}: there is no other. "
            + _nearest(name, CRITERIA)
        )
    parameters = inspect.signature(CRITERIA[name]).parameters
    known = [p for p in parameters if p not in ("model", "task", "layers", "generator")]
    types = get_type_hints(CRITERIA[name])
    for option, value in options.items():
        if option not in known:
            raise ValueError(
                f"`{name}.{option}` (={value!r}) must be an option of the criterion: it has "
                f"{', '.join(known) or 'none'}. " + _nearest(option, known)
            )
        _check_value(f"{name}.{option}", value, types[option])


def describe(name: str) -> str:
    """One line about the criterion `name`."""
    validate_options(name, {})
    return (inspect.getdoc(CRITERIA[name]) or "").splitlines()[0]


def _check_value(field: str, value: Any, expected: Any) -> None:
    if get_origin(expected) is Literal:
        allowed = get_args(expected)
        if value not in allowed:
            raise ValueError(
                f"`{field}` (={value!r}) must be one of {', '.join(allowed)}: there is no other. "
                + _nearest(str(value), allowed)
            )
        return
    assert expected == Sequence[int] | None, f"no check for {field}: {expected}"
    if value is None:
        return
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    if not (is_list and all(type(item) is int for item in value)):
        raise ValueError(
            f"`{field}` (={value!r}) must be a list of class indices: the criterion uses only "
            f"images of these classes. Write for example [0, 1], or leave it out for all."
        )


def _nearest(given: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(given, list(known), n=1)
    return f"Did you mean {matches[0]!r}?" if matches else "Use one of these or leave it out."


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
