"""One run as the service knows it: only what is new in its folder is read again."""

from __future__ import annotations

import collections
import json
import math
import os
import secrets
import threading
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import SearchConfig
from ..front import Front, reference_point
from ..locks import LOCK, SILENT_S, FileSign, Owner, in_use
from ..metrics import dense_value, metrics_of
from ..records import TrialResult, TrialStatus, is_uniform
from ..runs import BASELINE, CONFIG, Run
from ..store import RUNGS, Store, read_results, replaces
from .models import Failure, RunSummary, State, VolumeStep

FRESH_S = 0.5  # a snapshot so young is not looked at again
SETTLED_S = 2.0  # file systems stamp a folder with a coarse clock
MOST_FAILURES = 20
COLUMNS = (
    "trial_id", "status", "criterion", "control", "fidelity", "blocks_dropped", "finished_s",
    "message",
)  # fmt: skip
"""What comes before the metrics in a point."""

Point = tuple[int, list[Any]]  # the change that made it, and its values
Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment; never changed, so that every reader may share it.

    Attributes:
        epoch: Another one when the run was replaced by another of its name.
        version: Counts changes of rows.
        config: The resolved config.
        baseline: The dense model's metrics.
        rows: Trial -> its row.
        points: Trial -> its point, the one that changed last at the end.
        metrics: The metrics of points, in their order.
        volumes: How the hypervolume grew.
        summary: How far it is.
        notes: What could not be read.
    """

    epoch: str
    version: int
    config: SearchConfig
    baseline: Mapping[str, Any]
    rows: Mapping[str, TrialResult]
    points: Mapping[str, Point]
    metrics: tuple[str, ...]
    volumes: tuple[VolumeStep, ...]
    summary: RunSummary
    notes: tuple[str, ...] = ()

    @property
    def cursor(self) -> str:
        """Names what a reader of this snapshot has seen."""
        return f"{self.epoch}-{self.version}"

    def after(self, cursor: str | None) -> list[Point]:
        """The points that changed since `cursor`, all if it is of another epoch or none."""
        epoch, _, number = (cursor or "").partition("-")
        seen = int(number) if epoch == self.epoch and number.isdecimal() else 0
        found = []
        for point in reversed(self.points.values()):  # type: ignore[call-overload]
            if point[0] <= seen:
                break
            found.append(point)
        return found[::-1]

    def dense(self) -> dict[str, float]:
        """The dense model's value of each metric that was measured."""
        values = {m: dense_value(self.baseline, m) for m in metrics_of(self.config.probes)}
        return {m: v for m, v in values.items() if v is not None and self.baseline}

    @cached_property
    def progress(self) -> str:
        """How far it is, as JSON; made once for all clients."""
        document = {
            "summary": self.summary.model_dump(mode="json"),
            "volumes": [[v.trials, v.seconds, v.hypervolume] for v in self.volumes],
            "failures": [failure.model_dump() for failure in self.failures()],
        }
        return json.dumps(document)

    def failures(self) -> list[Failure]:
        """The causes of failed trials, the most frequent first."""
        failed = [row for row in self.rows.values() if row.status is TrialStatus.FAILED]
        counts = collections.Counter(row.message for row in failed)
        example = {row.message: row.trial_id for row in reversed(failed)}
        return [
            Failure(message=message, count=count, trial_id=example[message])
            for message, count in counts.most_common(MOST_FAILURES)
        ]


@dataclass
class _Read:
    """What has been read of a run folder."""

    config: SearchConfig
    baseline: dict[str, Any]
    front: Front
    has_volume: bool
    metrics: tuple[str, ...]
    about: tuple[Stamp | None, ...]
    epoch: str = field(default_factory=lambda: secrets.token_hex(4))
    version: int = 0
    folder: Stamp | None = None
    parts: dict[str, Stamp] = field(default_factory=dict)
    rows: dict[str, TrialResult] = field(default_factory=dict)
    points: dict[str, Point] = field(default_factory=dict)
    volumes: list[VolumeStep] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    began: float | None = None
    ended: int = 0
    looked: float = 0.0


class Ledger:
    """Follows one run folder. Any thread may ask for a snapshot."""

    def __init__(self, folder: Path) -> None:
        """Reads nothing yet."""
        self._folder = folder
        self._reading = threading.Lock()
        self._read: _Read | None = None
        self._snapshot: Snapshot | None = None
        self._taken = -math.inf

    @property
    def size(self) -> int:
        """How many rows it holds in memory."""
        return 0 if self._snapshot is None else len(self._snapshot.rows)

    def snapshot(self) -> Snapshot:
        """The run as it is now, or was half a second ago.

        Raises:
            ConfigError: If its folder is no run, or what is in it cannot be read.
        """
        with self._reading:
            fresh = time.monotonic() - self._taken < FRESH_S
            if self._snapshot is None or not fresh:
                self._snapshot = self._look()
                self._taken = time.monotonic()
            return self._snapshot

    def _look(self) -> Snapshot:
        about = tuple(_stamp(self._folder / name) for name in (CONFIG, BASELINE))
        read = self._read
        if read is None or read.about != about:
            read = self._read = self._begin(about)
        if not self._update(read):
            read = self._read = self._begin(about)
            self._update(read)
        return _taken(read, self._folder, self._snapshot)

    def _begin(self, about: tuple[Stamp | None, ...]) -> _Read:
        """Reads the config and the dense model; the rows follow."""
        run = Run(self._folder)
        config, baseline = run.config, run.baseline
        try:
            reference: Iterable[float] = reference_point(baseline, config.objectives)
            has_volume = True
        except (KeyError, TypeError):
            reference, has_volume = [math.nan] * len(config.objectives), False
        front = Front(config.objectives, list(reference))
        metrics = tuple(metrics_of(config.probes))
        return _Read(config, baseline, front, has_volume, metrics, about)

    def _update(self, read: _Read) -> bool:
        """Reads parts that are new; False if rows were taken away, so that all must be read."""
        trials = self._folder / "trials"
        folder = _stamp(trials)
        settled = read.looked - (folder[0] / 1e9 if folder else 0.0) > SETTLED_S
        if folder == read.folder and settled:
            return True
        parts = _parts(trials)
        new = {name: stamp for name, stamp in parts.items() if read.parts.get(name) != stamp}
        gone = read.parts.keys() - parts.keys()
        if gone and not any(name.startswith("compact-") for name in new):
            return False
        looked = time.time()
        rows = self._rows_of(new)
        if rows is None:
            rows, parts = self._all_rows(read), _parts(trials)
        for row in sorted(rows, key=lambda row: (row.finished_at or 0.0, row.trial_id)):
            _add(read, row)
        read.folder, read.parts, read.looked = folder, parts, looked
        return True

    def _rows_of(self, new: Mapping[str, Stamp]) -> list[TrialResult] | None:
        """The rows of new parts; None if one was compacted meanwhile, or cannot be read."""
        rows: list[TrialResult] = []
        try:
            for name in sorted(new, key=lambda name: new[name]):
                rows += read_results(self._folder / "trials" / name)
        except Exception:  # of whatever kind: the ledger's own reader deals with it, or says why
            return None
        return rows

    def _all_rows(self, read: _Read) -> list[TrialResult]:
        """All rows that can be read; damaged parts are set aside and noted."""
        with _warnings_lock, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rows = Store(self._folder).read()
        read.notes += [str(one.message) for one in caught]
        return rows


class Ledgers:
    """The runs of a results folder; those that were asked for least recently are forgotten."""

    MOST_ROWS = 60_000

    def __init__(self) -> None:
        """Knows no run."""
        self._known: collections.OrderedDict[Path, Ledger] = collections.OrderedDict()
        self._lock = threading.Lock()

    def of(self, folder: Path) -> Ledger:
        """The ledger of a run folder."""
        with self._lock:
            ledger = self._known.pop(folder, None) or Ledger(folder)
            self._known[folder] = ledger
            while len(self._known) > 1 and self._num_rows() > self.MOST_ROWS:
                self._known.popitem(last=False)
            return ledger

    def _num_rows(self) -> int:
        return sum(ledger.size for ledger in self._known.values())


_warnings_lock = threading.Lock()


def control_of(row: TrialResult) -> str | None:
    """Whether a trial is a control, and which."""
    if row.criterion == "random":
        return "random"
    return "uniform" if is_uniform(row) else None


def _add(read: _Read, row: TrialResult) -> None:
    """Takes a row that may be known already."""
    known = read.rows.get(row.trial_id)
    if known is not None and (known == row or not replaces(row, known)):
        return
    first = row.started_at or row.finished_at
    if first is not None and (read.began is None or first < read.began):
        read.began = first
    if known is None or known.status is TrialStatus.EARLY_STOPPED:
        read.ended += row.status is not TrialStatus.EARLY_STOPPED
    read.rows[row.trial_id] = row
    completed = known is not None and known.status is TrialStatus.COMPLETED
    if not completed and read.front.add(row) and read.has_volume:
        seconds = max(0.0, (row.finished_at or 0.0) - (read.began or 0.0))
        volume = read.front.hypervolume
        read.volumes.append(VolumeStep(trials=read.ended, seconds=seconds, hypervolume=volume))
    read.version += 1
    read.points.pop(row.trial_id, None)
    read.points[row.trial_id] = (read.version, _point(read, row))


def _point(read: _Read, row: TrialResult) -> list[Any]:
    finished_s = None
    if row.finished_at is not None and read.began is not None:
        finished_s = round(row.finished_at - read.began, 3)
    return [
        row.trial_id,
        str(row.status),
        row.criterion,
        control_of(row),
        row.fidelity,
        len(row.dropped_blocks),
        finished_s,
        row.message[:500],
        *(row.metric(name) for name in read.metrics),
    ]


def _taken(read: _Read, folder: Path, before: Snapshot | None) -> Snapshot:
    """A snapshot; the one before if nothing has changed since."""
    state, driver = _state(read, folder)
    cursor, notes = f"{read.epoch}-{read.version}", tuple(read.notes)
    rows: Mapping[str, TrialResult]
    points: Mapping[str, Point]
    if before is not None and before.cursor == cursor:
        known = before.summary.state, before.summary.driver, before.notes
        if known == (state, driver, notes):
            return before
        rows, points = before.rows, before.points
    else:
        rows, points = dict(read.rows), dict(read.points)
    return Snapshot(
        epoch=read.epoch,
        version=read.version,
        config=read.config,
        baseline=read.baseline,
        rows=rows,
        points=points,
        metrics=read.metrics,
        volumes=tuple(read.volumes),
        summary=_summary(read, folder, state, driver),
        notes=notes,
    )


def _summary(read: _Read, folder: Path, state: State, driver: str) -> RunSummary:
    config, rows = read.config, read.rows
    ends = [row.finished_at for row in rows.values() if row.finished_at is not None]
    return RunSummary(
        name=folder.name,
        state=state,
        message=" ".join(read.notes),
        model=config.model.name,
        data=config.data.name,
        trials=config.search.trials,
        finished=len(rows),
        by_status=dict(collections.Counter(str(row.status) for row in rows.values())),
        front=[member.trial_id for member in read.front.members],
        hypervolume=read.front.hypervolume if read.has_volume else None,
        objectives=dict(config.objectives),
        started_at=read.began,
        updated_at=max(ends, default=None),
        seconds_left=_seconds_left(read, max(ends, default=None)) if state == "running" else None,
        driver=driver,
    )


def _seconds_left(read: _Read, last: float | None) -> float | None:
    """By the pace since the first trial of the ledger; None while there is none."""
    if last is None or read.began is None or len(read.rows) < 2:
        return None
    left = max(0, read.config.search.trials - len(read.rows))
    return (last - read.began) / len(read.rows) * left


def _state(read: _Read, folder: Path) -> tuple[State, str]:
    """Whether a process drives the run, and which."""
    lock = folder / LOCK
    if not lock.is_symlink() and lock.is_file():
        owner = Owner.parse(FileSign(lock).read())
        if owner is not None and _drives(owner, folder):
            return "running", str(owner)
    waits = next((folder / RUNGS).glob("t*.*"), None)  # checkpoints go when nobody will go on
    done = len(read.rows) >= read.config.search.trials and waits is None
    return ("finished" if done else "interrupted"), ""


def _drives(owner: Owner, folder: Path) -> bool:
    if owner.is_here:
        return owner.runs_here and in_use(folder)
    return time.time() - (folder / LOCK).stat().st_mtime < SILENT_S


def _parts(trials: Path) -> dict[str, Stamp]:
    """The parts of a ledger that are whole: file -> stamp."""
    found = {}
    try:
        with os.scandir(trials) as entries:
            for entry in entries:
                whole = entry.name.endswith(".parquet") and entry.name[0] not in "_."
                if whole and entry.is_file(follow_symlinks=False):
                    found[entry.name] = _stamp_of(entry.stat(follow_symlinks=False))
    except FileNotFoundError:
        return {}
    return found


def _stamp(path: Path) -> Stamp | None:
    try:
        return _stamp_of(path.stat())
    except FileNotFoundError:
        return None


def _stamp_of(status: os.stat_result) -> Stamp:
    return status.st_mtime_ns, status.st_size, status.st_ino
