"""New parameters from old ones: drawn at random, mutated, crossed. Follows the space's walk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from ..space import Params, Space

SPREAD = 0.15  # of a number's range: the standard deviation of a mutation


class Variation:
    """Draws parameters of one space with one random generator."""

    def __init__(self, space: Space, rng: np.random.Generator) -> None:
        self._space = space
        self._rng = rng

    def random(self) -> Params:
        """Parameters drawn evenly, dimension by dimension."""
        return self._space.fill({}, self._draw)

    def mutate(self, params: Mapping[str, Any]) -> Params:
        """`params` with one to three dimensions changed."""
        count = min(len(params), int(self._rng.integers(1, 4)))
        chosen = set(self._rng.choice(list(params), count, replace=False).tolist())
        given = {name: value for name, value in params.items() if name not in chosen}

        def redraw(name: str, distribution: BaseDistribution) -> Any:
            if name not in chosen:
                return self._draw(name, distribution)
            return self._nearby(distribution, params[name])

        return self._space.fill(given, redraw)

    def cross(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> Params:
        """Each dimension from one of two parents (uniform crossover)."""
        names = [*one, *(name for name in other if name not in one)]
        first = {name: bool(self._rng.random() < 0.5) for name in names}
        given = {
            name: one[name] if name not in other or (name in one and first[name]) else other[name]
            for name in names
        }
        return self._space.fill(given, self._draw)

    def _draw(self, name: str, distribution: BaseDistribution) -> Any:
        match distribution:
            case CategoricalDistribution(choices=choices):
                return choices[int(self._rng.integers(len(choices)))]
            case IntDistribution(low=low, high=high):
                return int(self._rng.integers(low, high + 1))
            case FloatDistribution(low=low, high=high, log=log):
                value = self._rng.uniform(
                    *((math.log(low), math.log(high)) if log else (low, high))
                )
                return _snapped(distribution, math.exp(value) if log else value)
        raise AssertionError(distribution)

    def _nearby(self, distribution: BaseDistribution, value: Any) -> Any:
        match distribution:
            case CategoricalDistribution(choices=choices):
                others = [choice for choice in choices if choice != value] or list(choices)
                return others[int(self._rng.integers(len(others)))]
            case IntDistribution(low=low, high=high):
                reach = max(1, round(SPREAD * (high - low)))
                moved = value + int(self._rng.choice([-1, 1])) * int(
                    self._rng.integers(1, reach + 1)
                )
                return min(max(moved, low), high)
            case FloatDistribution(low=low, high=high, log=log, step=step):
                if log:
                    moved = value * math.exp(self._rng.normal() * SPREAD * math.log(high / low))
                elif step is not None:
                    jump = self._rng.choice([-1, 1]) * max(1.0, abs(self._rng.normal()))
                    moved = value + round(float(jump)) * step
                else:
                    moved = value + self._rng.normal() * SPREAD * (high - low)
                return _snapped(distribution, moved)
        raise AssertionError(distribution)


def _snapped(distribution: FloatDistribution, value: float) -> float:
    low, high, step = distribution.low, distribution.high, distribution.step
    value = min(max(float(value), low), high)
    return value if step is None else min(round(low + round((value - low) / step) * step, 9), high)
