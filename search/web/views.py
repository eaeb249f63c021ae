"""What the API answers, from snapshots; no state, no files but a run's small ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...methods.names import nearest
from ..config import dump_config
from ..front import front_of, hypervolume, points_of, reference_point
from ..metrics import direction_of
from ..records import TrialResult
from ..runs import ENVIRONMENT, Run, axes
from ..yaml_source import ConfigError
from .launch import Launch
from .ledger import COLUMNS, Snapshot
from .models import (
    ComparedRun,
    Comparison,
    Front,
    RunDetail,
    RunSummary,
    TrialDetail,
    TrialPage,
    TrialRow,
)
from .problems import ProblemError

SHOWN = frozenset(
    {"trial_id", "status", "criterion", "message", "fidelity", "candidate", "dropped_blocks"}
    | {"widths", "accuracy_by_fidelity", "recipe", "weights", "metrics"}
)
"""Columns of the ledger that a trial's description has under names of its own."""


def run_detail(snapshot: Snapshot, folder: Path) -> RunDetail:
    """A run with its config, dense model and history."""
    run = Run(folder)
    has_environment = (folder / ENVIRONMENT).is_file()
    return RunDetail(
        **snapshot.summary.model_dump(),
        metrics=list(snapshot.metrics),
        directions={name: direction_of(name) for name in snapshot.metrics},
        baseline=snapshot.dense(),
        failures=snapshot.failures(),
        volumes=list(snapshot.volumes),
        times=run.times,
        environment=run.environment if has_environment else {},
        config=dump_config(snapshot.config),
    )


def launched(summary: RunSummary | None, name: str, launch: Launch) -> RunSummary:
    """A run's summary with what is known of the process that was started here for it."""
    known = summary or RunSummary(name=name, state="starting")
    if launch.code is None:  # between its last trial and its end a search is alive, too
        starting = not launch.is_ending and known.state not in ("running", "finished")
        return known.model_copy(update={"state": "starting"}) if starting else known
    if launch.code == 0 or known.state in ("running", "finished"):
        return known
    if launch.code in (130, 143) and summary is not None:
        return known  # it was stopped
    return known.model_copy(update={"state": "failed", "message": launch.message})


def with_launch(detail: RunDetail, launch: Launch | None) -> RunDetail:
    """The same for a run's description."""
    if launch is None:
        return detail
    found = launched(detail, detail.name, launch)
    return detail.model_copy(update={"state": found.state, "message": found.message})


def row_of(snapshot: Snapshot, name: str, trial_id: str) -> TrialResult:
    """One row of the ledger.

    Raises:
        ProblemError: If there is none.
    """
    if trial_id not in snapshot.rows:
        hint = nearest(trial_id, list(snapshot.rows)) or f"/api/v1/runs/{name}/trials lists them."
        raise ProblemError(
            404, f"`trial` (={trial_id}) must be a trial of {name}: there is none. {hint}"
        )
    return snapshot.rows[trial_id]


def trial_page(
    snapshot: Snapshot,
    statuses: Sequence[str] | None,
    sort: str,
    descending: bool,
    offset: int,
    limit: int,
) -> TrialPage:
    """Some trials.

    Raises:
        ConfigError: If there is no such column.
    """
    columns = [*COLUMNS, *snapshot.metrics]
    _check("sort", sort, columns)
    index = columns.index(sort)
    found = [values for _, values in snapshot.points.values()]
    if statuses:
        found = [values for values in found if values[1] in statuses]
    found.sort(key=lambda values: str(values[0]))
    known = [values for values in found if values[index] is not None]
    known.sort(key=lambda values: values[index], reverse=descending)
    found = known + [values for values in found if values[index] is None]
    rows = [_row(snapshot, values) for values in found[offset : offset + limit]]
    return TrialPage(total=len(found), offset=offset, trials=rows)


def trial_detail(snapshot: Snapshot, name: str, trial_id: str) -> TrialDetail:
    """All that is known of a trial."""
    result = row_of(snapshot, name, trial_id)
    row = _row(snapshot, snapshot.points[trial_id][1])
    others = {k: v for k, v in dataclasses.asdict(result).items() if k not in SHOWN}
    return TrialDetail(
        **row.model_dump(exclude={"message", "metrics"}),
        message=result.message,
        metrics={**row.metrics, **result.metrics},
        candidate=json.loads(result.candidate),
        dropped_blocks=result.dropped_blocks,
        widths=result.widths,
        dense_widths=_widest(snapshot),
        accuracy_by_fidelity=result.accuracy_by_fidelity,
        columns=others,
        exportable=result.recipe is not None and result.weights is not None,
    )


def front(snapshot: Snapshot, x: str | None, y: str | None) -> Front:
    """The non-dominated trials in two metrics.

    Raises:
        ConfigError: If there is no such metric.
    """
    x, y = _axes(snapshot, x, y)
    members = _members(snapshot, x, y)
    volume = _volume(members, _reference(snapshot, x, y), x, y)
    return Front(
        x=x,
        y=y,
        hypervolume=volume,
        baseline=snapshot.dense(),
        members=[_row(snapshot, snapshot.points[m.trial_id][1]) for m in members],
    )


def comparison(
    snapshots: Mapping[str, Snapshot], a: str, b: str, x: str | None, y: str | None
) -> Comparison:
    """Two fronts side by side.

    `covers` is the coverage of two sets, Zitzler and Thiele 1998 (doi:10.1007/BFb0056872).

    Raises:
        ConfigError: If they are the same run, or a metric is unknown to one of them.
    """
    if a == b:
        raise ConfigError(f"`b` (={b}) must be another run than `a`. Choose two.")
    one, other = snapshots[a], snapshots[b]
    shared = [metric for metric in one.metrics if metric in other.metrics]
    x, y = _axes(one, x, y)
    for field, metric in (("x", x), ("y", y)):
        _check(field, metric, shared)
    fronts = {name: _members(snapshots[name], x, y) for name in (a, b)}
    corner = _common_corner([_reference(snapshots[name], x, y) for name in (a, b)], x, y)
    compared = []
    for name, rival in ((a, b), (b, a)):
        snapshot, members = snapshots[name], fronts[name]
        compared.append(
            ComparedRun(
                name=name,
                finished=len(snapshot.rows),
                covers=_coverage(members, fronts[rival], x, y),
                x=x,
                y=y,
                hypervolume=_volume(members, corner, x, y),
                baseline=snapshot.dense(),
                members=[_row(snapshot, snapshot.points[m.trial_id][1]) for m in members],
            )
        )
    return Comparison(x=x, y=y, metrics=shared, runs=compared)


# --- helpers ---------------------------------------------------------------------------------


def _row(snapshot: Snapshot, values: Sequence[Any]) -> TrialRow:
    named = dict(zip(COLUMNS, values, strict=False))
    figures = zip(snapshot.metrics, values[len(COLUMNS) :], strict=False)
    return TrialRow(**named, metrics={name: value for name, value in figures if value is not None})


def _widest(snapshot: Snapshot) -> dict[str, int]:
    """The most channels of each layer, of all trials; the first trial is the dense model."""
    widest: dict[str, int] = {}
    for row in snapshot.rows.values():
        for layer, width in row.widths.items():
            widest[layer] = max(width, widest.get(layer, 0))
    return widest


def _axes(snapshot: Snapshot, x: str | None, y: str | None) -> tuple[str, str]:
    for field, metric in (("x", x), ("y", y)):
        if metric is not None:
            _check(field, metric, snapshot.metrics)
    x, y = axes(snapshot.config.objectives, x, y)
    if x == y:
        raise ConfigError(f"`y` (={y}) must be another metric than `x`. Choose another.")
    return x, y


def _check(field: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        hint = nearest(name, known) or "Choose one of these."
        raise ConfigError(f"`{field}` (={name}) must be one of {', '.join(known)}. {hint}")


def _members(snapshot: Snapshot, x: str, y: str) -> list[TrialResult]:
    objectives = {y: direction_of(y), x: direction_of(x)}
    return front_of(list(snapshot.rows.values()), objectives)


def _reference(snapshot: Snapshot, x: str, y: str) -> tuple[float, ...] | None:
    try:
        return reference_point(snapshot.baseline, {x: "", y: ""})
    except (KeyError, TypeError):
        return None  # the dense model is not measured yet


def _common_corner(
    corners: Sequence[tuple[float, ...] | None], x: str, y: str
) -> tuple[float, ...] | None:
    """The worse of the reference points in each metric."""
    known = [corner for corner in corners if corner is not None]
    if len(known) < len(corners):
        return None
    worse = [min if direction_of(metric) == "maximize" else max for metric in (x, y)]
    return tuple(
        pick(values) for pick, values in zip(worse, zip(*known, strict=True), strict=True)
    )


def _volume(
    members: Sequence[TrialResult], corner: tuple[float, ...] | None, x: str, y: str
) -> float | None:
    if corner is None:
        return None
    points = points_of(members, {x: "", y: ""})
    return hypervolume(points, corner, [direction_of(m) == "maximize" for m in (x, y)])


def _coverage(
    one: Sequence[TrialResult], other: Sequence[TrialResult], x: str, y: str
) -> float | None:
    """The share of `other` that some member of `one` dominates or equals."""
    if not other:
        return None
    signs = [-1.0 if direction_of(metric) == "maximize" else 1.0 for metric in (x, y)]
    mine, theirs = (points_of(rows, {x: "", y: ""}) * signs for rows in (one, other))
    covered = sum(bool((mine <= point).all(axis=1).any()) for point in theirs)
    return covered / len(theirs)
