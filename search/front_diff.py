"""Two runs' fronts beside each other, measured from one reference point."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
from rich.table import Table

from .front import Array, hypervolume, points_of, reference_point
from .records import TrialResult
from .runs import Run
from .yaml_source import ConfigError

Objectives = Mapping[str, str]


def diff_fronts(a: Run, b: Run, objectives: Objectives | None = None) -> dict[str, Any]:
    """Compares the fronts of two runs, as plain values.

    Args:
        a: A run.
        b: Another one.
        objectives: Metric -> direction; None for those of both runs, which must be the same then.

    Returns:
        `runs` (label -> place), `objectives`, `reference_point` (of each objective the worse of
        the two runs' own), `hypervolume` (a, b, and both fronts together), `coverage` (the share
        of the other run's members that a run dominates or equals: the C of Zitzler and Thiele
        1999, doi:10.1109/4235.797969), `members` (of both, the best in the second objective
        first, with those of the other run that dominate them) and `notes` on what differs.

    Raises:
        ConfigError: If the objectives differ or were not measured.
    """
    objectives = objectives or _common(a, b)
    maximize = [direction == "maximize" for direction in objectives.values()]
    corner = _shared_corner(a, b, objectives, maximize)
    fronts = {"a": a.front_results(objectives), "b": b.front_results(objectives)}
    points = {label: points_of(members, objectives) for label, members in fronts.items()}
    both = np.concatenate([points["a"], points["b"]])
    return {
        "runs": {"a": a.place, "b": b.place},
        "objectives": dict(objectives),
        "reference_point": dict(zip(objectives, corner, strict=True)),
        "hypervolume": {
            name: hypervolume(some, corner, maximize)
            for name, some in (*points.items(), ("both", both))
        },
        "coverage": {
            "of_b_by_a": _coverage(points["a"], points["b"], maximize),
            "of_a_by_b": _coverage(points["b"], points["a"], maximize),
        },
        "members": _members(fronts, points, objectives, maximize),
        "notes": list(_notes(a, b)),
    }


def diff_tables(diff: Mapping[str, Any]) -> Iterable[Any]:
    """`diff_fronts` for people."""
    table = Table(title="Two fronts from one reference point")
    for name in ("run", "", "members", "not dominated", "hypervolume", "covers of the other"):
        table.add_column(name, justify="left" if name in ("run", "") else "right")
    for label, other in (("a", "b"), ("b", "a")):
        mine = [member for member in diff["members"] if member["run"] == label]
        table.add_row(
            label.upper(),
            diff["runs"][label],
            str(len(mine)),
            str(sum(not member["dominated_by"] for member in mine)),
            f"{diff['hypervolume'][label]:.4g}",
            _percent(diff["coverage"][f"of_{other}_by_{label}"]),
        )
    table.add_row("both", "", "", "", f"{diff['hypervolume']['both']:.4g}", "")
    yield table
    members = Table(title="Members of both fronts")
    for name in ("run", "trial", *diff["objectives"], "criterion", "dominated by"):
        members.add_column(name, justify="right" if name in diff["objectives"] else "left")
    for member in diff["members"]:
        members.add_row(
            member["run"].upper(),
            member["trial_id"],
            *(f"{member[metric]:.5g}" for metric in diff["objectives"]),
            member["criterion"] or "",
            ", ".join(member["dominated_by"]),
        )
    yield members
    corner = ", ".join(f"{name} {value:.5g}" for name, value in diff["reference_point"].items())
    yield f"reference point: {corner}"
    for note in diff["notes"]:
        yield f"note: {note}"


def _common(a: Run, b: Run) -> Objectives:
    one, other = a.config.objectives, b.config.objectives
    if set(one) != set(other):
        raise ConfigError(
            f"`objectives` of the two runs (={', '.join(one)}; {', '.join(other)}) must be the "
            "same: fronts in different metrics cannot be compared. Name two metrics that both "
            "have measured with --x and --y."
        )
    return one


def _shared_corner(
    a: Run, b: Run, objectives: Objectives, maximize: Sequence[bool]
) -> tuple[float, ...]:
    corners = []
    for run in (a, b):
        try:
            corners.append(reference_point(run.baseline, objectives))
        except KeyError as error:
            raise ConfigError(
                f"`{run.place}` must have measured {error.args[0]} of its dense model: the "
                "reference point is made of it. Choose other metrics with --x and --y."
            ) from None
    pairs = zip(*corners, maximize, strict=True)
    return tuple(min(x, y) if more else max(x, y) for x, y, more in pairs)


def _covers(one: Array, other: Array, maximize: Sequence[bool]) -> bool:
    """Whether `one` is at least as good as `other` in every objective."""
    return bool(np.where(maximize, one >= other, one <= other).all())


def _coverage(one: Array, other: Array, maximize: Sequence[bool]) -> float | None:
    """Share of `other`'s points that a point of `one` dominates or equals; None of no points."""
    if len(other) == 0:
        return None
    return float(np.mean([any(_covers(p, q, maximize) for p in one) for q in other]))


def _members(
    fronts: Mapping[str, Sequence[TrialResult]],
    points: Mapping[str, Array],
    objectives: Objectives,
    maximize: Sequence[bool],
) -> list[dict[str, Any]]:
    rows = []
    for label, other in (("a", "b"), ("b", "a")):
        for member, point in zip(fronts[label], points[label], strict=True):
            above = [
                rival.trial_id
                for rival, theirs in zip(fronts[other], points[other], strict=True)
                if _covers(theirs, point, maximize) and not (theirs == point).all()
            ]
            values = dict(zip(objectives, point.tolist(), strict=True))
            row = {"run": label, "dominated_by": above, **values}
            rows.append(_described(member) | row)
    key = list(objectives)[min(1, len(objectives) - 1)]
    sign = -1 if objectives[key] == "maximize" else 1
    return sorted(rows, key=lambda row: (sign * row[key], row["run"], row["trial_id"]))


def _described(member: TrialResult) -> dict[str, Any]:
    names = ("trial_id", "criterion", "dropped_blocks")
    return {name: getattr(member, name) for name in names} | {
        "candidate": json.loads(member.candidate)
    }


def _notes(a: Run, b: Run) -> Iterable[str]:
    """What differs between the runs and makes their figures hard to compare."""
    one, other = a.config, b.config
    for name in (
        "model.name",
        "data.name",
        "data.seed",
        "data.split",
        "data.image_size",
        "latency",
    ):
        here, there = attrgetter(name)(one), attrgetter(name)(other)
        if here != there:
            yield f"{name} differs: {here} and {there}"
    for name in ("cpu", "gpu", "torch"):
        here, there = (run.baseline.get("probe", {}).get(name) for run in (a, b))
        if here != there:
            yield f"latencies were measured with another {name}: {here} and {there}"
    here, there = a.baseline.get("accuracy"), b.baseline.get("accuracy")
    if here is not None and there is not None and here != there:
        yield f"the dense models differ: accuracy {here:.4f} and {there:.4f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
