"""From scores to kept channels: `num_kept`, the rules of one group, the rule `global`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from .names import unknown_name

Retain = Literal["peak30", "peak50_rand30", "bot50_rand30", "rand30"]
RETAINED = 0.3  # of the channels, in every retain mode

_ROUNDING = 1e-9  # what binary fractions may add: 0.07 * 100 is a little more than 7
_SUMMING = 1e-13  # what a sum of many scores may add, relative to it


def num_kept(channels: int, keep: float, *, round_to: int = 1) -> int:
    """How many of `channels` the fraction `keep` keeps: ceil(keep * channels), rounded.

    Args:
        channels: Number of channels, >= 1.
        keep: Fraction kept, in (0, 1].
        round_to: Round to the nearest multiple (halves up), at least one and at most all
            channels. All channels stay all, whether a multiple or not. Never decreases when
            `keep` or `channels` times `keep` grows.

    Returns:
        A number from min(round_to, channels) to channels.

    Raises:
        ValueError: If `keep` or `round_to` is out of range.
    """
    _check_fraction("keep", keep)
    return _rounded(math.ceil(keep * channels - _ROUNDING), channels, round_to)


def select_ratio(scores: Tensor, keep: float, *, round_to: int = 1) -> Tensor:
    """Keeps the `num_kept` channels of highest score. FGP eq. 11.

    Args:
        scores: Importance of each channel, [channels]; higher means keep.
        keep: Fraction of the channels kept, in (0, 1].
        round_to: See `num_kept`.

    Returns:
        Indices of the kept channels, int64 on the CPU, ascending. Of equal scores the lower
        index is kept.

    Raises:
        ValueError: If the scores are not finite, or `keep` or `round_to` is out of range.
    """
    order = _ranking(scores)
    return _sorted(order[: num_kept(len(order), keep, round_to=round_to)])


def select_cumulative(scores: Tensor, k: float, *, round_to: int = 1) -> Tensor:
    """Keeps the fewest channels that hold the fraction `k` of the total score. FGP section 5.4.

    Args:
        scores: Importance of each channel, [channels], >= 0; higher means keep.
        k: Fraction of the total score kept, in (0, 1]. Where all scores are zero, it is the
            fraction of channels, as in `select_ratio`.
        round_to: See `num_kept`.

    Returns:
        Indices of the kept channels, int64 on the CPU, ascending. Of equal scores the lower
        index is kept.

    Raises:
        ValueError: If the scores are not finite or negative, or `k` or `round_to` is out of range.
    """
    _check_fraction("k", k)
    order = _ranking(scores)
    if scores.min() < 0:
        raise ValueError(
            f"`scores` (lowest {scores.min():.3g}) must not be negative: a share of their sum "
            f"means nothing then. Use the rule 'ratio'."
        )
    cumulated = scores.detach().cpu().double()[order].cumsum(0)
    total = cumulated[-1].item()
    if total == 0:
        return select_ratio(scores, k, round_to=round_to)
    fewest = int((cumulated < k * total * (1 - _SUMMING)).sum()) + 1
    return _sorted(order[: _rounded(fewest, len(order), round_to)])


SELECTION_RULES: dict[str, Callable[..., Tensor]] = {
    "ratio": select_ratio,
    "cumulative": select_cumulative,
}


def select_global(
    scores: Mapping[str, Tensor], keep: float, *, round_to: int = 1, normalize: bool = True
) -> dict[str, Tensor]:
    """Keeps the channels of highest score among all groups together.

    Every group keeps at least its best channel, so that the model stays connected.

    Args:
        scores: Importance of each channel of each group, [channels]; higher means keep.
        keep: Fraction of all channels kept, in (0, 1].
        round_to: Widths become multiples of it, see `num_kept`.
        normalize: Divide the scores of a group by their mean first. Off for scores that can be
            compared between layers as they are (batch-norm scales, LAMP, losses).

    Returns:
        Group to the indices of its kept channels, int64 on the CPU, ascending. Of equal scores
        the one of the earlier group, then of the lower index, is kept.

    Raises:
        ValueError: If the scores are not finite, or `keep` or `round_to` is out of range.
    """
    orders = {name: _ranking(values) for name, values in scores.items()}
    comparable = {name: _comparable(values, normalize) for name, values in scores.items()}
    everything = torch.cat(list(comparable.values()))
    kept = torch.zeros(len(everything), dtype=torch.bool)
    kept[_ranking(everything)[: num_kept(len(everything), keep)]] = True
    parts = torch.split(kept, [len(order) for order in orders.values()])
    selected = {}
    for (name, order), part in zip(orders.items(), parts, strict=True):
        count = _rounded(max(1, int(part.sum())), len(order), round_to)
        selected[name] = _sorted(order[:count])
    return selected


def select_retain(
    scores: Tensor, retain: Retain, generator: torch.Generator, *, round_to: int = 1
) -> Tensor:
    """The ways of choosing 30 % of the channels that FGP compares (Fig. 4).

    Args:
        scores: Importance of each channel, [channels]; higher means keep.
        retain: `peak30`: the best. `rand30`: at random. `peak50_rand30` and `bot50_rand30`: at
            random from the better or the worse half (the middle one is in both).
        generator: CPU generator of the random choices.
        round_to: See `num_kept`.

    Returns:
        Indices of the kept channels, int64 on the CPU, ascending.

    Raises:
        ValueError: If `retain` is unknown or the scores are not finite.
    """
    if retain not in get_args(Retain):
        raise ValueError(unknown_name("retain", retain, get_args(Retain)))
    order = _ranking(scores)
    count = num_kept(len(order), RETAINED, round_to=round_to)
    half = max(count, math.ceil(len(order) / 2))
    if retain == "peak30":
        return _sorted(order[:count])
    pool = {
        "peak50_rand30": order[:half],
        "bot50_rand30": order[-half:],
        "rand30": order,
    }[retain]
    return _sorted(pool[torch.randperm(len(pool), generator=generator)[:count]])


def _ranking(scores: Tensor) -> Tensor:
    """Channel indices, best first; of equal scores the lower index first."""
    if scores.ndim != 1 or not len(scores):
        raise ValueError(
            f"`scores` (of shape {list(scores.shape)}) must be one number a channel: there is "
            f"nothing to select from. Give a tensor [channels]."
        )
    if not scores.isfinite().all():
        raise ValueError(
            "`scores` (with infinite or NaN values) must be finite: they cannot be ranked. "
            "Check the model that was scored."
        )
    return scores.detach().cpu().argsort(descending=True, stable=True)


def _comparable(scores: Tensor, normalize: bool) -> Tensor:
    values = scores.detach().cpu().double()
    mean = values.mean()
    return values / mean if normalize and mean > 0 else values


def _rounded(count: int, channels: int, round_to: int) -> int:
    if round_to < 1:
        raise ValueError(
            f"`round_to` (={round_to}) must be at least 1: widths become its multiples. "
            f"Use 1 for no rounding."
        )
    if count >= channels:
        return channels
    nearest = (2 * count + round_to) // (2 * round_to) * round_to
    return min(max(nearest, round_to), channels)


def _check_fraction(field: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(
            f"`{field}` (={value}) must be in (0, 1]: it is the fraction that is kept. "
            f"Use 1 for the whole."
        )


def _sorted(indices: Tensor) -> Tensor:
    return indices.sort().values
