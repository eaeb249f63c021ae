"""A candidate as numbers: what it makes of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ..records import Candidate
from ..space import DSD, Params, Space

Array = npt.NDArray[np.float64]
Point = tuple[Params, Candidate]
Hints = Callable[[Params, Candidate], Sequence[float]]
"""What is known of a candidate before it is tried, as numbers of about 0..1, in a fixed order."""


class Encoder:
    """Turns candidates of one space into feature rows, in kinds that share a lengthscale.

    Kinds: which blocks stay; the fraction of channels that each group has left (0 in a dropped
    block; where scores decide it, what the rule asks of the model as a whole); criterion; rule
    and its numbers; hints.

    Args:
        space: The search space.
        hints: What is known without a trial, such as the MACs; None where nothing is.
    """

    def __init__(self, space: Space, hints: Hints | None = None) -> None:
        self._space = space
        self._hints = hints or (lambda params, candidate: ())
        self._blocks = space.block_order
        self._groups = [group.name for group in space.plan.groups]
        self._internal = np.array([group.internal for group in space.plan.groups], dtype=bool)
        self._criteria = list(space.criteria)
        self._rules = sorted(
            {*space.config.select} | ({"global"} if DSD in self._criteria else set())
        )
        self._alive: dict[tuple[str, ...], Array] = {}
        sizes = [len(self._blocks), len(self._groups), len(self._criteria), len(self._rules) + 4]
        ends = np.cumsum(sizes).tolist()
        self._fixed = [slice(e - n, e) for e, n in zip(ends, sizes, strict=True) if n]

    def kinds(self, num_features: int) -> list[slice]:
        """The columns of each kind in rows of `num_features`; what follows the rule is hints."""
        end = self._fixed[-1].stop
        return [*self._fixed, *([slice(end, num_features)] if num_features > end else [])]

    def encode(self, points: Sequence[Point]) -> Array:
        """Features, [num_points, num_features], each about in 0..1."""
        rows = [[*self._row(c), *self._hints(params, c)] for params, c in points]
        return np.array(rows, dtype=np.float64)

    def _row(self, c: Candidate) -> list[float]:
        stays = [float(block not in c.dropped_blocks) for block in self._blocks]
        widths = self._widths(c)
        criterion = [float(c.criterion == name) for name in self._criteria]
        rule = [float(c.select == name) for name in self._rules]
        k = 1.0 if c.k is None or c.select == "ratio" else c.k
        strength = 0.0
        if c.dsd_lambda is not None:
            low, high = self._space.config.dsd_lambda.low, self._space.config.dsd_lambda.high
            span = np.log(high / low) or 1.0
            strength = 0.5 + 0.5 * float(np.log(c.dsd_lambda / low) / span)
        longest = max(self._space.config.dsd_epochs)
        numbers = [k, strength, c.dsd_q or 0.0, (c.dsd_epochs or 0.0) / longest]
        return [*stays, *widths, *criterion, *rule, *numbers]

    def _widths(self, c: Candidate) -> list[float]:
        if c.dropped_blocks not in self._alive:
            alive = {group.name for group in self._space.alive(c.dropped_blocks)}
            mask = [float(name in alive) for name in self._groups]
            self._alive[c.dropped_blocks] = np.array(mask)
        kept = np.ones(len(self._groups))
        if c.criterion == DSD:
            kept[self._internal] = c.k or 1.0
        elif c.select == "ratio":
            keep = dict(c.keep)
            kept = np.array([keep.get(name, 1.0) for name in self._groups])
        elif c.criterion is not None:
            kept[:] = 0.3 if c.k is None else c.k**0.5 if c.select == "macs" else c.k
        widths: list[float] = (kept * self._alive[c.dropped_blocks]).tolist()
        return widths
