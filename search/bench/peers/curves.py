"""Hypervolume over time, and who is ahead when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...front import hypervolume

SLOWEST = 1.1  # reference point: accuracy 0 at 1.1 x the dense model's cost
POINTS = 20
FRACTIONS = tuple((index + 1) / POINTS for index in range(POINTS))
FIRST = 0.1  # who is ahead counts after this share of the time
COSTS = ("latency", "macs")


@dataclass(frozen=True)
class Point:
    """A candidate as hypervolume sees it.

    Attributes:
        seconds: When it was finished.
        accuracy: Validation accuracy.
        costs: Latency and MACs, each over the dense model's.
    """

    seconds: float
    accuracy: float
    costs: Mapping[str, float]


def curve(
    points: Sequence[Point], cost: str, seconds: float, dense_accuracy: float
) -> list[float]:
    """Hypervolume of (accuracy, cost) at each of `FRACTIONS` of the time, 0 to below 1.

    Args:
        points: The candidates of one method and seed.
        cost: `latency` or `macs`.
        seconds: The budget.
        dense_accuracy: That of the dense model, a candidate of cost 1 from the start.
    """
    volumes = []
    for fraction in FRACTIONS:
        done = [p for p in points if p.seconds <= fraction * seconds + 1e-9]
        values = [[dense_accuracy, 1.0], *([p.accuracy, p.costs[cost]] for p in done)]
        volumes.append(hypervolume(values, (0.0, SLOWEST), [True, False]) / SLOWEST)
    return volumes


def num_ahead(ours: Sequence[float], theirs: Sequence[float]) -> tuple[int, int]:
    """At how many of the points after the first tenth `ours` is above, and of how many."""
    late = [i for i, fraction in enumerate(FRACTIONS) if fraction > FIRST + 1e-9]
    return sum(ours[i] > theirs[i] for i in late), len(late)


def spread(curves: Sequence[Sequence[float]]) -> tuple[list[float], list[float], list[float]]:
    """Lowest, median and highest curve over the seeds, point by point."""
    array = np.asarray(curves, dtype=np.float64)
    low, median, high = array.min(0), np.median(array, 0), array.max(0)
    return low.tolist(), median.tolist(), high.tolist()
