"""Trials that runs share: not run again, judged anew, and only where nothing differs."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, command, write_config

from prunesearch.methods.measure import Latency
from prunesearch.methods.surgery import apply
from prunesearch.search import Run
from prunesearch.search.cache import Cache, sharing_here
from prunesearch.search.config import DEFAULT_PROBE, SearchConfig, parse_config
from prunesearch.search.context import TrialContext, TrialSpec
from prunesearch.search.dense import prepare_dense
from prunesearch.search.digests import model_key
from prunesearch.search.finished import OF_THE_RUN, FinishedTrials, finished_key
from prunesearch.search.records import Candidate, TrialResult, TrialStatus
from prunesearch.search.setup import Problem, make_space, pose
from prunesearch.search.shelf import Shelf, address
from prunesearch.search.trial import run_trial

CANDIDATE = Candidate("magnitude_l1", ("layer2.1",), "global", k=0.6)
LATENCY = Latency(2.0, 1.9, 2.1, 0.5, 0.4, 0.6)


def config(**sections: Any) -> SearchConfig:
    data: dict[str, Any] = {
        "model": {"name": "resnet20"},
        "data": {"name": "digits", "image_size": 8, "limit": 240, "batch_size": 32,
                 "calibration_size": 64},
        "baseline": {"epochs": 1, "lr": 0.05},
        "space": {"criteria": ["magnitude_l1", {"fgp": {"feature_point": "act"}}],
                  "blocks": {"mode": "ranked", "order": "oneshot"}},
        "recover": {"epochs": 0.5},
        "cache": {"reuse": "dense"},
    }  # fmt: skip
    return parse_config(data | sections)


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    posed = pose(config())
    prepare_dense(posed, tmp_path_factory.mktemp("run"), lambda message: None)
    return posed


def context_of(problem: Problem, folder: Path, run: str, **changes: Any) -> TrialContext:
    """A worker of a run whose cache is in `folder/run`, before the user's in `folder/user`."""
    cache = Cache(folder / run, folder / "user")
    context = TrialContext(
        problem.config,
        problem.task,
        problem.model,
        problem.plan,
        problem.task.evaluate(problem.model)["accuracy"],
        lambda recipe: ({DEFAULT_PROBE: LATENCY}, 0.0),
        shared=sharing_here(cache),
        finished=FinishedTrials(cache.published, cache.publish, run),
    )
    return dataclasses.replace(context, **changes)


def spec(candidate: Candidate = CANDIDATE, seed: int = 1, trial_id: str = "t00003") -> TrialSpec:
    return TrialSpec(trial_id, candidate, candidate.to_json(), seed)


def test_a_finished_trial_is_reused_with_its_weights(problem: Problem, tmp_path: Path) -> None:
    first = run_trial(spec(), context_of(problem, tmp_path, "first"))
    slower = dataclasses.replace(LATENCY, latency_ms=0.7)
    second_context = context_of(
        problem,
        tmp_path,
        "second",
        measure_latency=lambda recipe: ({DEFAULT_PROBE: slower}, 0.0),
    )
    second = run_trial(spec(trial_id="t00007"), second_context)
    assert first.result.message == "" and first.result.status == TrialStatus.COMPLETED
    assert second.result.message == "reused: t00003 of first"
    assert second.result.status == TrialStatus.COMPLETED and second.result.trial_id == "t00007"
    assert second.result.latency_ms == 0.7, "this run's device"
    for name in {f.name for f in dataclasses.fields(TrialResult)} - OF_THE_RUN:
        assert getattr(second.result, name) == getattr(first.result, name), name
    assert second.result.accuracy_drop == first.result.accuracy_drop
    assert second.result.finetune_s == second.result.score_s == second.result.prune_s == 0
    assert not (tmp_path / "second").exists(), "no scores were asked for"
    assert second.recipe == first.recipe and second.recipe is not None
    assert second.state is not None
    pruned = apply(copy.deepcopy(problem.model), problem.plan, second.recipe)
    pruned.load_state_dict(second.state)
    assert problem.task.evaluate(pruned)["accuracy"] == first.result.accuracy


def test_a_warm_cache_shortens_the_last_rung_and_changes_nothing(
    problem: Problem, tmp_path: Path
) -> None:
    """What is promoted and proposed next follows from these rows."""
    cold, warm = (_climb(context_of(problem, tmp_path, run)) for run in ("cold", "warm"))
    assert [r.message for r in cold] == [""] * 3
    assert [r.message for r in warm] == ["", "", "reused: t00003 of cold"]
    assert [str(r.status) for r in warm] == ["early_stopped", "early_stopped", "completed"]
    assert [_measured(r) for r in cold] == [_measured(r) for r in warm]
    assert warm[2].finetune_s == warm[1].finetune_s > 0


def _climb(context: TrialContext) -> list[TrialResult]:
    """The rows of a trial from rung to rung."""
    rows: list[TrialResult] = []
    for fidelity in range(3):
        row = copy.deepcopy(rows[-1]) if rows else None
        todo = dataclasses.replace(spec(), fidelity=fidelity, row=row)
        rows.append(run_trial(todo, context).result)
    return rows


def test_feasible_is_what_this_runs_constraints_say(problem: Problem, tmp_path: Path) -> None:
    strict = config(constraints=["accuracy_drop <= -1"])
    infeasible = run_trial(spec(), context_of(problem, tmp_path, "strict", config=strict)).result
    assert infeasible.status == TrialStatus.INFEASIBLE
    loose = run_trial(spec(), context_of(problem, tmp_path, "loose")).result
    assert (loose.status, loose.message) == (TrialStatus.COMPLETED, "reused: t00003 of strict")
    again = run_trial(spec(), context_of(problem, tmp_path, "again", config=strict)).result
    assert again.status == TrialStatus.INFEASIBLE
    assert re.fullmatch(r"violates accuracy_drop.*; reused: t00003 of strict", again.message)


def test_failed_and_unfinished_trials_are_not_shared(problem: Problem, tmp_path: Path) -> None:
    diverging = config(recover={"epochs": 0.5, "lr": 1e30})
    failed = run_trial(spec(), context_of(problem, tmp_path, "a", config=diverging)).result
    assert failed.status == TrialStatus.FAILED
    assert "trial" not in Shelf(tmp_path / "user").usage()


def test_a_trial_is_another_one_when_anything_it_depends_on_differs(
    problem: Problem, tmp_path: Path
) -> None:
    data = problem.task.data
    images = data.val.images.clone()
    images[0, 0, 0, 0] += 1
    val = dataclasses.replace(data.val, images=images)
    other_data = copy.copy(problem.task)
    other_data.data = dataclasses.replace(data, val=val)
    heavier = copy.deepcopy(problem.model)
    with torch.no_grad():
        heavier.fc.bias.add_(1e-6)

    def key(trial: TrialSpec, **changes: Any) -> str:
        return address(finished_key(trial, context_of(problem, tmp_path, "run", **changes)))

    same = {
        key(spec()),
        key(spec(trial_id="t00009")),
        key(spec(), config=config(search={"trials": 7}, constraints=["accuracy_drop <= 0.1"])),
        key(spec(), config=config(latency={"runs": 50}, objectives={"macs": "minimize"})),
        key(spec(), config=config(sparse_training={"lr": 0.5})),
    }
    assert len(same) == 1
    others = [
        key(spec(seed=2)),
        key(spec(dataclasses.replace(CANDIDATE, k=0.7))),
        key(spec(), config=config(recover={"epochs": 1.0})),
        key(spec(), config=config(search={"seed": 3})),
        key(spec(), task=other_data, data_digest=""),
        key(spec(), dense=heavier),
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        others.append(key(spec()))
    finally:
        torch.set_num_threads(threads)
    assert len(same | set(others)) == 1 + len(others)


@pytest.mark.parametrize(
    ("files", "name"),
    [(("nets_a.py", "parts_a.py"), "nets_a:net"),
     (("nets_b/__init__.py", "nets_b/deep/__init__.py", "nets_b/deep/net.py", "nets_b/parts.py"),
      "nets_b.deep.net:net")],
)  # fmt: skip
def test_a_model_of_ones_own_is_all_the_code_it_may_import(
    files: tuple[str, ...], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for version, changed in enumerate(("", *files)):
        for file in files:
            path = tmp_path / str(version) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("other = 1" if file == changed else "")
        module = name.partition(":")[0]
        with monkeypatch.context() as patch:
            patch.syspath_prepend(tmp_path / str(version))
            importlib.import_module(module)
            found.append(model_key(config(model={"name": name}))["source"])
        for known in [m for m in sys.modules if m.startswith(module.partition(".")[0])]:
            del sys.modules[known]
    assert len(set(found)) == 1 + len(files)


def test_blocks_are_ranked_once_for_all_runs(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNE_SEARCH_CACHE", str(tmp_path / "user"))
    sharing = dataclasses.replace(problem, config=config(cache={"reuse": "all"}))
    said: dict[str, list[str]] = {"a": [], "b": [], "alone": []}
    drops = {
        run: make_space(posed, tmp_path / run, said[run].append).drops
        for run, posed in (("a", sharing), ("b", sharing), ("alone", problem))
    }
    assert drops["a"] == drops["b"] == drops["alone"] and len(drops["a"]) > 2
    ranked = {run: any("evaluations" in line for line in lines) for run, lines in said.items()}
    assert ranked == {"a": True, "b": False, "alone": True}


def test_a_second_run_makes_nothing_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on a Ray of its own: dense model, ranking, latencies, trials are the first run's."""
    monkeypatch.setenv("PRUNE_SEARCH_CACHE", str(tmp_path / "user"))
    text = SMALL.replace("cache: {reuse: dense}", "").replace("trials: 6", "trials: 3")
    settings = write_config(tmp_path, text)
    shelf = Shelf(tmp_path / "user" / "results")
    runs: list[Run] = []
    kept: list[Any] = []
    for name in ("first", "second"):
        done = command("run", settings, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        runs.append(Run(tmp_path / name))
        kept.append(shelf.usage())
    assert kept[0] == kept[1]
    assert kept[0].keys() == {"dense", "ranking", "reference", "latency", "scores", "trial"}
    first, second = (one.results() for one in runs)
    assert [r.message for r in first] == [""] * 3
    whole = [r.trial_id for r in first if r.fidelity == 2]
    assert whole and {r.trial_id: r.message for r in second} == {
        r.trial_id: f"reused: {r.trial_id} of small" * (r.trial_id in whole) for r in first
    }
    assert [_measured(r) for r in first] == [_measured(r) for r in second]
    assert runs[1].baseline["source"] == "cache"
    assert runs[0].baseline["latency_ms"] == runs[1].baseline["latency_ms"]
    assert runs[0].times["trials_s"] > 0
    for member in runs[1].front_results():
        assert member.weights is not None and (runs[1].folder / member.weights).is_file()


def _measured(result: TrialResult) -> list[Any]:
    names = {f.name for f in dataclasses.fields(result)} - OF_THE_RUN
    names |= {"latency_ms", "latency_ms_p10", "latency_ms_p90", "speedup", "accuracy_drop"}
    names |= {"status", "candidate", "on_front", "accuracy_by_fidelity"}
    return [getattr(result, name) for name in sorted(names)]
