"""What a run says while it goes, and the tables of a finished one."""

import dataclasses
import io
import time
from pathlib import Path

import pytest
import torch
from helpers import ranked
from rich.console import Console

from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.models.build import build_model
from prunesearch.search.config import SearchConfig, dump_config, parse_config
from prunesearch.search.context import TrialSpec
from prunesearch.search.coordinator import Coordinator, Listener
from prunesearch.search.dense import Baseline
from prunesearch.search.progress import Progress
from prunesearch.search.records import TrialResult, TrialStatus
from prunesearch.search.runs import Run
from prunesearch.search.space import Space
from prunesearch.search.tables import front_table, status_of, status_table, time_table

BASELINE = Baseline(0.9, 0.3, 1000, 100, 1.0, "trained", 1, 0.0, latency_ms=2.0)
CONFIG = parse_config(
    {
        "model": {"name": "resnet20"},
        "data": {"name": "digits"},
        "space": {"criteria": ["magnitude_l1"]},
        "search": {"sampler": "random", "trials": 4, "seeds": False},
    }
)


def new(folder: Path, listener: Listener, config: SearchConfig = CONFIG) -> Coordinator:
    plan = plan_pruning(build_model("resnet20", num_classes=10), torch.zeros(2, 3, 16, 16))
    return Coordinator(config, Space(config.space, plan, ranked(())), BASELINE, folder, listener)


def ask(coordinator: Coordinator) -> TrialSpec | None:
    while (spec := coordinator.next()) is None and not coordinator.done:
        time.sleep(0.01)
    return spec


def drain(coordinator: Coordinator) -> None:
    while (spec := ask(coordinator)) is not None:
        row = TrialResult(spec.trial_id, TrialStatus.COMPLETED, candidate=spec.candidate_json)
        n = int(spec.trial_id[1:])
        row.accuracy, row.accuracy_drop = 0.8 - n / 100, 0.1 + n / 100
        row.latency_ms, row.speedup, row.finetune_s = 1.0 - n / 100, 2.0, 3.0
        coordinator.finish(row)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_follows_a_run(tmp_path, terminal):
    out = io.StringIO()
    progress = Progress(Console(file=out, force_terminal=terminal, width=120))
    coordinator = new(tmp_path, progress.finished)
    with progress.live(coordinator):
        spec = ask(coordinator)
        progress.running(1)
        coordinator.fail(spec.trial_id, "it broke [badly]")
        drain(coordinator)
        progress.running(0)
    coordinator.close()
    text = out.getvalue()
    assert "4/4" in text and "hypervolume" in text and "1 failed" in text
    if not terminal:
        assert "t00000 failed: it broke [badly]" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_says_once_why_a_run_stops_early(tmp_path, terminal):
    search = CONFIG.search.model_copy(update={"plateau_trials": 1})
    config = CONFIG.model_copy(update={"search": search})
    out = io.StringIO()
    progress = Progress(Console(file=out, force_terminal=terminal, width=200))
    coordinator = new(tmp_path, progress.finished, config)
    with progress.live(coordinator):
        specs = [ask(coordinator), ask(coordinator), ask(coordinator)]
        for spec in specs:  # all alike: the second ends the search while the third runs
            row = TrialResult(spec.trial_id, TrialStatus.COMPLETED, candidate=spec.candidate_json)
            row.accuracy, row.latency_ms, row.speedup = 0.8, 1.0, 2.0
            coordinator.finish(row)
    coordinator.close()
    assert out.getvalue().count("no more trials start: the front's hypervolume grew by") == 1
    resumed, out = new(tmp_path, lambda result: None, config), io.StringIO()
    with Progress(Console(file=out)).live(resumed):
        assert resumed.next() is None
    resumed.close()
    assert "(search.plateau_trials)" in out.getvalue().replace("\n", " ")


def test_tables_show_a_finished_run(tmp_path):
    coordinator = new(tmp_path, lambda result: None)
    coordinator.fail(ask(coordinator).trial_id, "it broke")
    drain(coordinator)
    coordinator.close()
    BASELINE.write(tmp_path)
    assert Baseline.read(tmp_path) == dataclasses.replace(BASELINE, probe={})
    (tmp_path / "config.yaml").write_text(dump_config(CONFIG))
    run, out = Run(tmp_path), io.StringIO()
    status = status_of(run)
    console = Console(file=out, width=200)
    for table in (front_table(run), status_table(status), time_table(run)):
        console.print(table)
    assert status["by_status"] == {"failed": 1, "completed": 3}
    assert status["failures"] == {"it broke": 1} and status["trial_times"]["finetune_s"] == 9.0
    assert "dense" in out.getvalue() and "t00003" in out.getvalue()
