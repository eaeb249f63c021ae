"""The protocol of `bench peers`: curves by hand, logs, the process of a method, resuming."""

from __future__ import annotations

import copy
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from helpers import write_config
from safetensors.torch import load_file
from torch import nn

from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.measure import count_macs, count_params
from prunesearch.methods.surgery import Recipe, apply, layer_widths
from prunesearch.search.bench.peers import run as peers_run
from prunesearch.search.bench.peers import torch_pruning
from prunesearch.search.bench.peers.curves import FRACTIONS, Point, curve, num_ahead, spread
from prunesearch.search.bench.peers.ladder import ladder
from prunesearch.search.bench.peers.log import (
    LINES,
    Architecture,
    Log,
    count_failures,
    read_log,
)
from prunesearch.search.bench.peers.ours import _interrupted_after, entry
from prunesearch.search.bench.peers.problem import PeerProblem, pose_problem
from prunesearch.search.bench.peers.registry import METHODS, Method, check_methods
from prunesearch.search.config import ConfigError, load_config
from prunesearch.search.progress import Progress
from prunesearch.search.records import TrialResult, TrialStatus


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> PeerProblem:
    """The small search's model, trained for one epoch, as files."""
    folder = tmp_path_factory.mktemp("peers")
    config = load_config(write_config(folder), ["baseline.epochs=1", "latency.runs=10"])
    return pose_problem(config, folder / "problem", lambda _: None)


def test_curve_by_hand() -> None:
    points = [
        Point(5.0, 0.8, {"latency": 0.5, "macs": 0.6}),
        Point(15.0, 0.6, {"latency": 0.2, "macs": 0.1}),
        Point(20.5, 1.0, {"latency": 0.1, "macs": 0.1}),  # after the time: never counts
    ]
    volumes = curve(points, "latency", 20.0, 0.9)
    dense = 0.9 * 0.1
    first = dense + 0.8 * 0.5
    both = first + 0.6 * 0.3
    for fraction, volume in zip(FRACTIONS, volumes, strict=True):
        seconds = 20 * fraction
        expected = both if seconds >= 15 else first if seconds >= 5 else dense
        assert volume == pytest.approx(expected / 1.1), fraction
    assert curve(points, "macs", 20.0, 0.9)[-1] == pytest.approx(
        (0.9 * 0.1 + 0.8 * 0.4 + 0.6 * 0.5) / 1.1
    )


def test_ahead_counts_the_points_after_the_first_tenth() -> None:
    ours = [0.0, 0.0] + [0.5] * 18
    assert num_ahead(ours, [0.9, 0.9] + [0.4] * 18) == (18, 18)
    assert num_ahead(ours, [0.0, 0.0] + [0.5] * 17 + [0.4]) == (1, 18)  # equal is not ahead
    assert spread([[1.0, 5.0], [3.0, 4.0], [2.0, 9.0]]) == ([1, 4], [2, 5], [3, 9])


def test_ladder_spans_early() -> None:
    whole = ladder(0.0, 8.0)
    assert [next(whole) for _ in range(7)] == [4, 2, 6, 1, 5, 3, 7]


def test_methods_take_turns_to_begin() -> None:
    assert peers_run.rotated(["a", "b", "c"], 0) == ["a", "b", "c"]
    assert peers_run.rotated(["a", "b", "c"], 4) == ["b", "c", "a"]
    with pytest.raises(ConfigError, match="Did you mean `torch-pruning`"):
        check_methods(["torch-prunning"])


@pytest.mark.parametrize("importance", ["l1", "taylor"])
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_torch_pruning_script(
    problem: PeerProblem, tmp_path: Path, importance: str, scope: str
) -> None:
    log = Log(tmp_path, problem, started=0.0)
    torch_pruning.run(problem, log, ways=f"{importance} {scope}", limit=1)
    (one,) = read_log(tmp_path, seconds=1e12)
    assert one.macs < problem.baseline["macs"] and not one.architecture.dropped_blocks
    assert problem.dense.fc.out_features == 10  # nobody changes the dense model
    model = one.architecture.build(problem.dense)
    assert (count_macs(model, problem.task.example_input()), count_params(model)) == (
        one.macs,
        one.num_params,
    )
    assert one.weights is not None
    model.load_state_dict(load_file(tmp_path / one.weights))
    assert problem.accuracy(model) == one.accuracy  # the log's accuracy is the stored weights'
    if scope == "uniform":
        assert model.conv1.out_channels == 8  # the ladder begins at 0.475 of 16


def test_torch_pruning_deals_out_every_way_at_every_ratio(
    problem: PeerProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[int, list[tuple[str, str, float]]] = {0: [], 1: []}
    for worker, mine in asked.items():

        def prune(_: PeerProblem, *way: Any, mine: list[Any] = mine) -> nn.Module:
            mine.append(way)
            raise ValueError("only asked")

        monkeypatch.setattr(torch_pruning, "prune", prune)
        log = Log(tmp_path, problem, started=0.0)
        torch_pruning.run(problem, log, worker=worker, workers=2, limit=4)
    both = sorted(asked[0] + asked[1], key=lambda way: way[2])
    pairs = [("l1", "global"), ("l1", "uniform"), ("taylor", "global"), ("taylor", "uniform")]
    assert [ratio for _, _, ratio in both] == pytest.approx([0.2625] * 4 + [0.475] * 4)
    assert sorted(both[:4]) == sorted((*pair, both[0][2]) for pair in pairs)
    assert asked[0][0] == ("l1", "uniform", pytest.approx(0.475))


def test_log_drops_what_is_late_or_torn(problem: PeerProblem, tmp_path: Path) -> None:
    log = Log(tmp_path, problem, started=0.0)
    log.finished("late", copy.deepcopy(problem.dense), 0.5)
    log.failed("bad", FloatingPointError("the loss is nan"))
    line = json.loads((tmp_path / LINES).read_text().splitlines()[0])
    with (tmp_path / LINES).open("a") as file:
        file.write(json.dumps(line | {"label": "early", "seconds": 3.0}) + "\n")
        file.write(json.dumps(line | {"label": "torn", "seconds": 4.0})[:50])
    assert [e.label for e in read_log(tmp_path, seconds=10.0)] == ["early"]
    assert count_failures(tmp_path) == 1


def test_row_of_the_ledger_gives_the_trial_its_architecture(problem: PeerProblem) -> None:
    plan = plan_pruning(problem.dense, problem.task.example_input(2))
    kept = {g.name: tuple(range(1, g.num_channels, 2)) for g in plan.groups}
    dropped = ("layer2.1",)
    alive = {g.name for g in plan.alive(dropped)}
    recipe = Recipe(dropped, {n: k for n, k in kept.items() if n in alive})
    model = apply(copy.deepcopy(problem.dense), plan, recipe)
    row = TrialResult(
        "t00000",
        TrialStatus.COMPLETED,
        dropped_blocks=list(dropped),
        widths=layer_widths(model),
        accuracy=0.5,
        macs=count_macs(model, problem.task.example_input()),
        num_params=count_params(model),
        finished_at=107.0,
    )
    one = entry(row, problem, plan, started=100.0)
    assert (one.seconds, one.accuracy) == (7.0, 0.5)
    assert one.architecture == Architecture.of(problem.dense, model)
    rebuilt = one.architecture.build(problem.dense)
    assert count_macs(rebuilt, problem.task.example_input()) == row.macs


WRITES = """\
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / "candidates.jsonl").write_text(sys.argv[2] + chr(10))
if sys.argv[3] == "for ever":
    time.sleep(3600)
"""


def test_bench_reports_and_runs_nothing_twice(
    problem: PeerProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log(tmp_path, problem, started=time.time())
    log.finished("0000", copy.deepcopy(problem.dense), 0.5)
    line = (tmp_path / LINES).read_text().strip()
    (tmp_path / LINES).unlink()
    started = []

    def command(name: str, problem: Path, folder: Path, **_: float) -> list[str]:
        started.append(name)
        return [sys.executable, "-c", WRITES, str(folder), line, "then end"]

    for name in ("ours", "fastnas"):
        monkeypatch.setitem(METHODS, name, Method(name, METHODS[name].label, ends=True))
    monkeypatch.setattr(peers_run, "command", command)
    overrides = ["baseline.epochs=1", "latency.runs=10"]
    config = load_config(write_config(tmp_path), overrides)
    out = tmp_path / "bench"

    def bench(seconds: float) -> dict[str, Any]:
        return peers_run.bench_peers(
            config, out, Progress.silent(), seconds=seconds, seeds=1, methods=["ours", "fastnas"]
        )

    result = bench(1e9)
    text = result["markdown"]
    assert result["candidates"] == {"ours": 1, "fastnas": 1} and not any(
        result["failures"].values()
    )
    assert started == ["ours", "fastnas"]
    assert "| ModelOpt FastNAS | accuracy and MACs | 0 of 18 |" in text  # equal is not ahead
    rows = pq.read_table(f"{out}.parquet").to_pylist()
    assert [(r["method"], r["label"], r["on_front_macs"]) for r in rows] == [
        ("ours", "0000", True),
        ("fastnas", "0000", True),
    ]
    assert rows[0]["speedup"] == rows[1]["speedup"]  # one architecture is measured once
    assert Path(f"{out}.png").stat().st_size > 0
    assert bench(1e9) == result and started == ["ours", "fastnas"]
    (out / "seed0" / "ours" / "done.json").unlink()  # as a run that was cut short leaves it
    assert bench(1e9) == result and started == ["ours", "fastnas", "ours"]
    with pytest.raises(ConfigError, match="differs in seconds"):
        bench(1.0)


def test_a_method_that_goes_on_is_stopped(
    problem: PeerProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(name: str, problem: Path, folder: Path, **_: float) -> list[str]:
        return [sys.executable, "-c", WRITES, str(folder), "", "for ever"]

    monkeypatch.setattr(peers_run, "command", command)
    summary = peers_run._run_method("fastnas", problem, tmp_path / "m", seconds=0.01)
    assert summary["candidates"] == 0


def test_a_method_that_breaks_says_why(
    problem: PeerProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    monkeypatch.setattr(peers_run, "command", lambda *_, **__: broken)
    with pytest.raises(RuntimeError, match="no such thing"):
        peers_run._run_method("fastnas", problem, tmp_path / "m", seconds=1e6)
    assert not (tmp_path / "m" / "done.json").exists()


def test_search_ends_when_the_time_is_over() -> None:
    with _interrupted_after(0.01):
        while True:
            time.sleep(1)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_every_method_has_a_module() -> None:
    folder = Path(peers_run.__file__).parent
    for name, method in METHODS.items():
        assert (folder / f"{method.module}.py").is_file(), name


def test_recovery_is_seeded_by_candidate(problem: PeerProblem) -> None:
    draws = [torch.rand(1, generator=problem.generator(n)).item() for n in (0, 1, 0)]
    assert draws[0] == draws[2] != draws[1]
