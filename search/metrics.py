"""The metrics of a trial, and what an objective or a constraint may say about them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from ..methods.names import nearest
from .config_errors import RuleError

Direction = Literal["maximize", "minimize"]

METRICS: dict[str, Direction] = {
    "accuracy": "maximize",
    "accuracy_drop": "minimize",
    "loss": "minimize",
    "latency_ms": "minimize",
    "speedup": "maximize",
    "macs": "minimize",
    "num_params": "minimize",
    "peak_memory_mib": "minimize",
}
"""Columns of `TrialResult` that a search can optimise or bound, and their better direction."""

BY_PROBE = ("latency_ms", "speedup")
"""Metrics that named probes measure too; at the probe `edge` they are called `latency_ms@edge`."""

_SAME = (("accuracy", "accuracy_drop"), ("latency_ms", "speedup"))


def metrics_of(probes: Iterable[str]) -> list[str]:
    """The names of all metrics where there are these named probes."""
    return [*METRICS, *(f"{metric}@{probe}" for probe in probes for metric in BY_PROBE)]


def direction_of(metric: str) -> Direction:
    """The better direction of a metric, also of one of a named probe."""
    return METRICS[split(metric)[0]]


def split(metric: str) -> tuple[str, str]:
    """`latency_ms@edge` as `latency_ms` and `edge`; the probe of other metrics is empty."""
    name, _, probe = metric.partition("@")
    return name, probe


def dense_value(baseline: Mapping[str, Any], metric: str) -> float | None:
    """The dense model's value of a metric; None where it was not measured.

    Args:
        baseline: The fields of `Baseline`.
        metric: Its name.
    """
    name, probe = split(metric)
    if name in ("speedup", "accuracy_drop"):
        return 1.0 if name == "speedup" else 0.0
    if probe:
        baseline = baseline.get("latency_by_probe", {}).get(probe, {})
    value: float | None = baseline.get(name)
    return value


def further(found: Mapping[str, float]) -> dict[str, float]:
    """What a task's evaluation tells beside the columns `accuracy` and `loss`."""
    return {name: value for name, value in found.items() if name not in ("accuracy", "loss")}


@dataclass(frozen=True)
class Constraint:
    """A bound on one metric, such as `accuracy_drop <= 0.05`."""

    metric: str
    op: Literal["<=", "<", ">=", ">"]
    bound: float

    @classmethod
    def parse(cls, text: object) -> Constraint:
        """Read `metric <= number`.

        Raises:
            ValueError: If it is not of that form or the metric is unknown.
        """
        form = re.fullmatch(r"\s*(\w+(?:@\w+)?)\s*(<=|>=|<|>)\s*([^\s<>=]+)\s*", str(text))
        bound = _number(form[3]) if form else math.nan
        if form is None or not math.isfinite(bound):
            raise RuleError(
                "have the form `metric <= number` (or <, >=, >)",
                fix="Write for example `accuracy_drop <= 0.05`.",
            )
        if not _well_formed(form[1]):
            raise RuleError(
                f"bound one of {', '.join(METRICS)}",
                fix=nearest(form[1], METRICS) or "Choose one of these.",
            )
        return cls(form[1], cast(Literal["<=", "<", ">=", ">"], form[2]), bound)

    def violation(self, value: float) -> float:
        """How far `value` is beyond the bound, in the metric's unit; <= 0 where it holds."""
        beyond = value - self.bound if self.op[0] == "<" else self.bound - value
        return math.ulp(self.bound) if beyond == 0 and self.op in ("<", ">") else beyond

    def __str__(self) -> str:
        """Inverse of `parse`."""
        return f"{self.metric} {self.op} {self.bound!r}"


def check_objectives(objectives: object) -> dict[str, str]:
    """Check 1 to 4 `metric: direction` pairs.

    Raises:
        ValueError: For an unknown metric, a direction that makes no sense, or two metrics of
            which one follows from the other.
    """
    if not isinstance(objectives, Mapping) or not 1 <= len(objectives) <= 4:
        raise RuleError(
            "map 1 to 4 metrics to maximize or minimize",
            fix="Write for example `{accuracy: maximize, latency_ms: minimize}`.",
        )
    for metric, direction in objectives.items():
        if not _well_formed(metric):
            raise RuleError(
                f"be one of {', '.join(METRICS)}: it is no metric of a trial",
                metric,
                fix=nearest(metric, METRICS) or "Choose one of these.",
            )
        if direction != direction_of(metric):
            raise RuleError(
                f"be {direction_of(metric)}: that is the better direction of {metric}",
                metric,
                fix=f"Write `{metric}: {direction_of(metric)}`.",
            )
    for metric in objectives:
        name, at, probe = metric.partition("@")
        for first, second in _SAME:
            if name == second and f"{first}{at}{probe}" in objectives:
                raise RuleError(
                    f"not name both {first}{at}{probe} and {metric}: one follows from the other",
                    fix=f"Delete {metric}.",
                )
    return dict(objectives)


def check_constraints(constraints: tuple[Constraint, ...]) -> tuple[Constraint, ...]:
    """Check that bounds can be met, and that no two exclude each other.

    Raises:
        ValueError: Naming the later of two that do.
    """
    for index, one in enumerate(constraints):
        if one.metric == "accuracy" and not 0 <= one.bound <= 1:
            raise RuleError(
                "bound accuracy between 0 and 1: it is a fraction",
                index,
                fix=f"Write `accuracy {one.op} {one.bound / 100:g}` for a per cent.",
            )
        for other in constraints[:index]:
            opposite = one.metric == other.metric and one.op[0] != other.op[0]
            if opposite and max(one.violation(other.bound), other.violation(one.bound)) > 0:
                raise RuleError(
                    f"not contradict `{other}`: no value satisfies both",
                    index,
                    fix="Delete one of the two.",
                )
    return constraints


def check_probes(
    objectives: Mapping[str, str], constraints: Sequence[Constraint], probes: Iterable[str]
) -> None:
    """Check that the probes that metrics name are there.

    Raises:
        ValueError: Naming the objective or the constraint that names another one.
    """
    known = metrics_of(probes)
    named: list[tuple[str, tuple[str | int, ...]]]
    named = [(metric, ("objectives", metric)) for metric in objectives]
    named += [(one.metric, ("constraints", index)) for index, one in enumerate(constraints)]
    for metric, place in named:
        if metric not in known:
            raise RuleError(
                f"name one of {', '.join(known)}: `probes` has no {split(metric)[1]}",
                *place,
                fix=nearest(metric, known[len(METRICS) :]) or "Add it to `probes`.",
            )


def _well_formed(metric: str) -> bool:
    """Whether it is a metric, or would be with the right probe."""
    name, at, probe = metric.partition("@")
    return name in METRICS and (not at or (name in BY_PROBE and bool(probe)))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
