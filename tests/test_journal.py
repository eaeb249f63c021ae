"""The Optuna journal of a ledger: Optuna itself reads it."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from prunesearch.search.config import dump_config, parse_config
from prunesearch.search.journal import write_journal
from prunesearch.search.records import TrialResult, TrialStatus
from prunesearch.search.runs import Run
from prunesearch.search.store import Store


def row(number: int, status: TrialStatus, **changes: object) -> TrialResult:
    params: dict[str, object] = {"drop:layer1.1": number % 2 == 0, "select": "ratio"}
    params |= {"keep:layer1": 0.3 + number / 20} if number % 3 else {"num_blocks": number}
    candidate = {"origin": "surrogate", "params": params, "sampler_attrs": {}}
    measured = {} if status is TrialStatus.FAILED else {"accuracy": number / 10, "macs": number}
    return TrialResult(
        f"t{number:05d}", status, candidate=json.dumps(candidate),
        started_at=1e9 + number, finished_at=1e9 + number + 5, **measured, **changes,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = parse_config(
        {
            "name": "journalled",
            "model": {"name": "resnet20"},
            "data": {"name": "digits"},
            "objectives": {"accuracy": "maximize", "macs": "minimize"},
            "constraints": ["macs <= 4"],
        }
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    store = Store(tmp_path)
    for number, status in enumerate(TrialStatus):
        store.write_trial(row(number, status, message=f"it is {status}"))
    store.write_trial(row(9, TrialStatus.INFEASIBLE))
    return Run(tmp_path)


def test_optuna_reads_what_the_ledger_says(run: Run) -> None:
    path = write_journal(run)
    assert path == run.folder / "study.journal"
    study = optuna.load_study(
        study_name="journalled", storage=JournalStorage(JournalFileBackend(str(path)))
    )
    assert study.metric_names == ["accuracy", "macs"]
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    rows = run.results()
    for trial, result in zip(study.trials, rows, strict=True):
        assert trial.params == json.loads(result.candidate)["params"]
        assert trial.user_attrs["status"] == result.status
        assert trial.user_attrs["trial_id"] == result.trial_id
        assert trial.duration is not None and trial.duration.total_seconds() == 5
        if trial.state is TrialState.COMPLETE:
            assert trial.values == [result.accuracy, result.macs]
    assert {trial.user_attrs["status"]: trial.state.name for trial in study.trials} == {
        "completed": "COMPLETE", "failed": "FAIL", "infeasible": "COMPLETE",
        "early_stopped": "PRUNED", "duplicate": "COMPLETE",
    }  # fmt: skip
    best = {trial.user_attrs["trial_id"] for trial in study.best_trials}
    assert "t00000" in best and "t00009" not in best  # nine violates the bound


def test_it_can_be_made_again_and_of_an_empty_run(run: Run) -> None:
    first = write_journal(run).read_text()
    assert len(write_journal(run).read_text().splitlines()) == len(first.splitlines())
    for part in (run.folder / "trials").iterdir():
        part.unlink()
    path = write_journal(run)
    storage = JournalStorage(JournalFileBackend(str(path)))
    assert optuna.load_study(study_name="journalled", storage=storage).trials == []
