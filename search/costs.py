"""What any candidate of a space costs, told from its parameters without building it."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..methods.layer_costs import LayerCosts
from ..methods.layer_latency import FRACTIONS, LayerLatencies
from .config import ConfigError
from .metrics import split
from .records import Candidate
from .sensitivity import SensitivityTable
from .setup import Problem
from .space import FRACTION_OF, SELECT, Space
from .store import read_as, write_json

BY_LATENCY = ("latency_ms", "latency_ms_p10", "latency_ms_p90", "speedup")
BY_MACS = ("macs", "peak_memory_mib", *BY_LATENCY)
LAYERS = "layers.json"


class Costs:
    """MACs and parameters of the space's candidates, without building them.

    Args:
        space: The space.
        layers: The dense model's layers.
        table: Says what the rules cost whose widths depend on scores; None where there is none.
        latencies: Of the layers alone; None where they were not measured.
    """

    def __init__(
        self,
        space: Space,
        layers: LayerCosts,
        table: SensitivityTable | None = None,
        latencies: LayerLatencies | None = None,
    ) -> None:
        self._space = space
        self.layers = layers
        self._table = table
        self._latencies = latencies

    def macs(self, params: Mapping[str, Any], candidate: Candidate | None = None) -> int:
        """Multiply-adds of one image: exact under the rule `ratio`, else an estimate."""
        candidate = candidate or self._space.candidate(params)
        keep = dict(candidate.keep)
        macs = self.layers.macs(keep, candidate.dropped_blocks)
        return round(macs * self._by_scores(candidate, "macs"))

    def num_params(self, params: Mapping[str, Any], candidate: Candidate | None = None) -> int:
        """Parameters: exact under the rule `ratio`, else an estimate."""
        candidate = candidate or self._space.candidate(params)
        keep = dict(candidate.keep)
        count = self.layers.num_params(keep, candidate.dropped_blocks)
        return round(count * self._by_scores(candidate, "num_params"))

    def latency(self, params: Mapping[str, Any]) -> float:
        """Latency relative to the dense model's, in 0..1: the sum of the layers' own."""
        assert self._latencies is not None
        candidate = self._space.candidate(params)
        outputs, inputs = self.layers.layer_fractions(dict(candidate.keep))
        living = self.layers.living(candidate.dropped_blocks)
        fraction = self._latencies.fraction(outputs, inputs, living)
        return fraction * self._by_scores(candidate, "macs")

    def objective(
        self, objectives: Mapping[str, str]
    ) -> tuple[str, Callable[[Mapping[str, Any]], float]] | None:
        """The first objective that can be told from the parameters alone, and how.

        Memory is told by the MACs, and so is latency where no layers were measured. Latency at
        any probe is told by the layers on the default one.
        """
        for name, _ in map(split, objectives):
            if name in BY_LATENCY and self._latencies is not None:
                return "latency", self.latency
            if name == "num_params":
                return name, self.num_params
            if name in BY_MACS:
                return "macs", self.macs
        return None

    def _by_scores(self, candidate: Candidate, metric: str) -> float:
        """The fraction that stays where widths depend on scores: between the measured levels."""
        rule, k = candidate.select, candidate.k
        if rule == "macs" and k is not None and metric == "macs":
            without = self.layers.macs(
                {}, candidate.dropped_blocks
            )  # of all channels, as k is not
            return min(1.0, k * self.layers.macs({}) / without)
        if self._table is None or rule in (None, "ratio"):
            return 1.0
        dense = getattr(self._table, metric)
        name = FRACTION_OF.get(str(rule), f"{SELECT}:{rule}")
        points = sorted(
            (e.value, getattr(e, metric) / dense)
            for e in self._table.entries
            if e.dimension == name
        )
        if not points:
            return 1.0 if k is None else k**2
        if k is None:
            return float(points[0][1])
        points = [(0.0, 0.0), *points, (1.0, 1.0)]
        right = max(1, bisect.bisect_left([p[0] for p in points], k))
        (x0, y0), (x1, y1) = points[right - 1], points[min(right, len(points) - 1)]
        return float(y0 if x1 == x0 else y0 + (k - x0) / (x1 - x0) * (y1 - y0))


def costs_of(
    problem: Problem,
    space: Space,
    table: SensitivityTable | None,
    run_dir: Path,
    measure_layers: Callable[[], LayerLatencies],
) -> Costs:
    """The costs of a run's candidates; layers are timed once, where latency is an objective."""
    layers = LayerCosts(problem.model, problem.plan, problem.task.example_input())
    path, latencies = run_dir / LAYERS, None
    if path.exists():
        latencies = _read_latencies(path, len(layers.calls))
    elif table is not None and any(
        split(name)[0] in BY_LATENCY for name in problem.config.objectives
    ):
        latencies = measure_layers()
        write_json(path, dataclasses.asdict(latencies))
    return Costs(space, layers, table, latencies)


def _read_latencies(path: Path, num_layers: int) -> LayerLatencies:
    found = read_as(path, LayerLatencies)
    square = all(
        [len(row) for row in layer] == [len(FRACTIONS)] * len(FRACTIONS) for layer in found.ratios
    )
    if not (square and len(found.shares) == len(found.ratios) == num_layers):
        raise ConfigError(
            f"`{path}` must hold {num_layers} layers, each at {len(FRACTIONS)} by "
            f"{len(FRACTIONS)} widths. Delete it: the layers are measured again."
        )
    return found
