"""An Optuna journal made from a run's ledger, for optuna-dashboard and one's own analysis.

It is a copy: the search never reads it, and it is as old as the command that made it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial, TrialState

from .config import ConfigError, SearchConfig
from .metrics import METRICS
from .records import TrialResult, TrialStatus, violations
from .store import atomic_write_bytes

if TYPE_CHECKING:
    from .runs import Run

JOURNAL = "study.journal"
STATES = {
    TrialStatus.COMPLETED: TrialState.COMPLETE,
    TrialStatus.INFEASIBLE: TrialState.COMPLETE,
    TrialStatus.DUPLICATE: TrialState.COMPLETE,
    TrialStatus.EARLY_STOPPED: TrialState.PRUNED,
    TrialStatus.FAILED: TrialState.FAIL,
}


def write_journal(run: Run) -> Path:
    """Writes `study.journal` into the run folder, atomically; returns its path.

    The study is called as the run and has the objectives' names. An early-stopped trial is PRUNED.
    What was measured, the status, the message and the origin are user attributes.
    """
    config, rows = run.config, run.results()
    backend = _Lines()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(
            study_name=config.name,
            storage=JournalStorage(backend),
            directions=list(config.objectives.values()),
        )
        study.set_metric_names(list(config.objectives))
    given = [_params(row) for row in rows]
    dimensions = _dimensions(given)
    study.add_trials(
        [_trial(row, params, dimensions, config) for row, params in zip(rows, given, strict=True)]
    )
    path = run.folder / JOURNAL
    atomic_write_bytes(path, backend.text().encode())
    return path


class _Lines(BaseJournalBackend):
    """A journal in memory: one line is written at once, not one synced to the disk a trial."""

    def __init__(self) -> None:
        self._logs: list[dict[str, Any]] = []

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self._logs += json.loads(json.dumps(logs))

    def text(self) -> str:
        """As `JournalFileBackend` reads it."""
        return "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in self._logs)


def _params(row: TrialResult) -> dict[str, Any]:
    params = json.loads(row.candidate).get("params")
    if isinstance(params, dict) and not any(isinstance(v, (list, dict)) for v in params.values()):
        return params
    raise ConfigError(
        f"`candidate` of trial {row.trial_id} must have `params`, name to value: no search wrote "
        "this row. Take its file out of trials/."
    )


def _trial(
    row: TrialResult,
    params: Mapping[str, Any],
    dimensions: Mapping[str, BaseDistribution],
    config: SearchConfig,
) -> FrozenTrial:
    values = [row.metric(name) for name in config.objectives]
    state = STATES[row.status]
    if state is TrialState.COMPLETE and None in values:
        state = TrialState.FAIL  # such as a duplicate of a failed trial
    judged = state is TrialState.COMPLETE and row.status is not TrialStatus.DUPLICATE
    measured = {name: row.metric(name) for name in METRICS}
    facts = {"status": str(row.status), "message": row.message, "trial_id": row.trial_id}
    trial = optuna.trial.create_trial(
        state=state,
        values=[v for v in values if v is not None] if state is TrialState.COMPLETE else None,
        params=dict(params),
        distributions={name: dimensions[name] for name in params},
        constraints=violations(config.constraints, row) if judged else None,
        user_attrs=facts
        | {"origin": str(json.loads(row.candidate).get("origin", ""))}
        | {name: value for name, value in measured.items() if value is not None},
    )
    if row.started_at is not None:
        trial.datetime_start = datetime.fromtimestamp(row.started_at, UTC).replace(tzinfo=None)
    if row.finished_at is not None:
        trial.datetime_complete = datetime.fromtimestamp(row.finished_at, UTC).replace(tzinfo=None)
    return trial


def _dimensions(given: Sequence[Mapping[str, Any]]) -> dict[str, BaseDistribution]:
    """One distribution a parameter, over what was tried: the space may have changed meanwhile."""
    tried: dict[str, list[Any]] = {}
    for params in given:
        for name, value in params.items():
            tried.setdefault(name, []).append(value)
    return {name: _distribution(values) for name, values in tried.items()}


def _distribution(values: Sequence[Any]) -> BaseDistribution:
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return IntDistribution(min(values), max(values))
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return FloatDistribution(min(values), max(values))
    return CategoricalDistribution(sorted(set(values), key=str))
