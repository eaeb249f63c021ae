"""Trackers hear of each trial that ends; one that fails costs one warning."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from prunesearch.search import ConfigError, parse_config
from prunesearch.search import trackers as module
from prunesearch.search.config import SearchConfig
from prunesearch.search.records import TrialResult, TrialStatus
from prunesearch.search.store import Store
from prunesearch.search.trackers import Reports, check_trackers

ROWS = [
    TrialResult("t00000", TrialStatus.COMPLETED, accuracy=0.5, macs=100),
    TrialResult("t00001", TrialStatus.FAILED, message="no"),
    TrialResult("t00002", TrialStatus.COMPLETED, accuracy=0.75, macs=200),
]


def config(*trackers: str) -> SearchConfig:
    return parse_config(
        {"name": "told", "model": {"name": "resnet20"}, "data": {"name": "digits"},
         "trackers": list(trackers)}
    )  # fmt: skip


def report(settings: SearchConfig, folder: Path, rows: list[TrialResult]) -> list[str]:
    said: list[str] = []
    reports = Reports(settings, folder, said.append)
    for number, row in enumerate(rows, start=1):
        reports.trial(row, rows[:number], hypervolume=0.1 * number, trials=number)
    Store(folder).write_front(rows[:1])
    reports.close()
    return said


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_tensorboard_shows_curves(tmp_path: Path) -> None:
    assert report(config("tensorboard"), tmp_path, ROWS) == []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    accuracy = [(point.step, point.value) for point in events.Scalars("trial/accuracy")]
    assert accuracy == [(1, 0.5), (3, 0.75)], "a failed trial has none"
    assert [point.value for point in events.Scalars("front/members")] == [1, 2, 3]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_keeps_one_run_over_two_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient, set_tracking_uri

    uri = (tmp_path / "server").as_uri()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    set_tracking_uri(uri)
    folder = tmp_path / "run"
    folder.mkdir()
    assert report(config("mlflow"), folder, ROWS[:1]) == []
    assert report(config("mlflow"), folder, ROWS) == []
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("prune-search")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["trial/accuracy"] == 0.75
    assert run.data.params["model.name"] == "resnet20"
    assert run.info.run_name == "told" and run.info.status == "FINISHED"
    assert [f.path for f in client.list_artifacts(run.info.run_id)] == ["front.parquet"]


def test_a_tracker_that_fails_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        run_id = "x"

        def __init__(self, *arguments: Any) -> None:
            self.calls = 0

        def log(self, metrics: Any, step: int) -> None:
            raise ConnectionError("the server is away\nmore")

        def close(self, front: Path) -> None:
            pytest.fail("it was dropped")

    monkeypatch.setitem(module.TRACKERS, "mlflow", (Failing, "json"))
    said = report(config("mlflow"), tmp_path, ROWS)
    assert said == [
        "warning: mlflow hears no more of this run: ConnectionError: the server is away"
    ]


def test_one_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.TRACKERS, "wandb", (object, "no_such_module"))
    with pytest.raises(ConfigError, match=r"`trackers\[0\]` .=wandb. must be installed.*wandb"):
        check_trackers(config("wandb"))
    with pytest.raises(ConfigError, match=r"`trackers\[0\]` .=neptune.*tensorboard"):
        config("neptune")


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_stays_in_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    assert report(config("wandb"), tmp_path, ROWS) == []
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60
    while b"trial/accuracy" not in kept.read_bytes():  # another process of W&B's writes it
        assert time.monotonic() < deadline
        time.sleep(0.1)
