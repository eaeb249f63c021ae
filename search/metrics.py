"""The metrics of a trial, and what an objective or a constraint may say about them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from ..methods.names import nearest
from .config_errors import RuleError

METRICS: dict[str, Literal["maximize", "minimize"]] = {
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

_SAME = (("accuracy", "accuracy_drop"), ("latency_ms", "speedup"))


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
        form = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>)\s*([^\s<>=]+)\s*", str(text))
        bound = _number(form[3]) if form else math.nan
        if form is None or not math.isfinite(bound):
            raise RuleError(
                "have the form `metric <= number` (or <, >=, >)",
                fix="Write for example `accuracy_drop <= 0.05`.",
            )
        if form[1] not in METRICS:
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
        if metric not in METRICS:
            raise RuleError(
                f"be one of {', '.join(METRICS)}: it is no metric of a trial",
                metric,
                fix=nearest(metric, METRICS) or "Choose one of these.",
            )
        if direction != METRICS[metric]:
            raise RuleError(
                f"be {METRICS[metric]}: that is the better direction of {metric}",
                metric,
                fix=f"Write `{metric}: {METRICS[metric]}`.",
            )
    for first, second in _SAME:
        if first in objectives and second in objectives:
            raise RuleError(
                f"not name both {first} and {second}: one follows from the other",
                fix=f"Delete {second}.",
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


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
