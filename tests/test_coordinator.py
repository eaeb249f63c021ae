"""The coordinator: every trial once, every end a row, and the ledger is the truth."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ranked

from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.models.build import build_model
from prunesearch.methods.surgery import PruningPlan
from prunesearch.search.config import SearchConfig, parse_config
from prunesearch.search.context import TrialSpec
from prunesearch.search.coordinator import Coordinator, trial_id
from prunesearch.search.records import TrialResult, TrialStatus
from prunesearch.search.setup import Baseline
from prunesearch.search.space import Space
from prunesearch.search.store import Store, read_results

BASELINE = Baseline(0.9, 0.3, 1000, 100, 1.0, "trained", 1, 0.0, latency_ms=2.0)
BLOCKS = ("layer1.1", "layer2.1")


@pytest.fixture(scope="module")
def plan() -> PruningPlan:
    return plan_pruning(build_model("resnet20", num_classes=10), torch.zeros(2, 3, 16, 16))


def config(trials: int = 8, **search: Any) -> SearchConfig:
    return parse_config(
        {
            "model": {"name": "resnet20"},
            "data": {"name": "digits"},
            "space": {"criteria": ["magnitude_l1"], "select": ["ratio"]},
            "search": {"sampler": "random", "trials": trials, **search},
        }
    )


def few_candidates(trials: int, **search: Any) -> SearchConfig:
    """A space of three candidates: everything, or one of two blocks dropped."""
    settings = config(trials, **search)
    space = settings.space.model_copy(update={"criteria": ()})
    return settings.model_copy(update={"space": space})


class Bench:
    """Coordinators over one run folder."""

    def __init__(self, plan: PruningPlan, folder: Path) -> None:
        self.plan, self.folder, self.heard = plan, folder, []

    def open(self, settings: SearchConfig) -> Coordinator:
        plan = self.plan if settings.space.criteria else PruningPlan((), {})
        space = Space(settings.space, plan, ranked(BLOCKS))
        return Coordinator(settings, space, BASELINE, self.folder, self.heard.append)


@pytest.fixture
def bench(plan, tmp_path) -> Bench:
    return Bench(plan, tmp_path)


def ask(coordinator: Coordinator) -> TrialSpec | None:
    """The next trial, however long the sampler takes; None when there is no more."""
    while (spec := coordinator.next()) is None and not coordinator.done:
        time.sleep(0.01)
    return spec


def ended(spec: TrialSpec, accuracy: float = 0.8, latency_ms: float = 1.0) -> TrialResult:
    return TrialResult(
        spec.trial_id,
        TrialStatus.COMPLETED,
        criterion=spec.candidate.criterion,
        candidate=spec.candidate_json,
        dropped_blocks=list(spec.candidate.dropped_blocks),
        accuracy=accuracy,
        accuracy_drop=0.9 - accuracy,
        latency_ms=latency_ms,
        speedup=2.0 / latency_ms,
        finetune_s=3.0,
        seed=spec.seed,
        started_at=time.time(),
        finished_at=time.time(),
    )


def drain(coordinator: Coordinator, most: int = 1000) -> list[TrialSpec]:
    """Runs up to `most` trials one after the other; each is a bit faster and less accurate."""
    specs = []
    while len(specs) < most and (spec := ask(coordinator)) is not None:
        specs.append(spec)
        n = int(spec.trial_id[1:])
        coordinator.finish(ended(spec, 0.8 - n / 100, 1.0 - n / 100))
    return specs


# --- proposing -------------------------------------------------------------------------------


def test_every_trial_is_proposed_once_and_recorded(bench):
    coordinator = bench.open(config(8))
    assert coordinator.remaining == 8 and not coordinator.done
    specs = drain(coordinator)
    assert coordinator.done and coordinator.next() is None
    coordinator.close()
    rows = Store(bench.folder).read()
    assert [row.trial_id for row in rows] == [trial_id(n) for n in range(8)]
    assert len({spec.candidate.key for spec in specs}) == len(specs)
    assert sorted(row.trial_id for row in bench.heard) == [row.trial_id for row in rows]


def test_trials_run_side_by_side_and_may_end_in_any_order(bench):
    coordinator = bench.open(config(6, seeds=False))
    specs = [ask(coordinator) for _ in range(6)]
    assert coordinator.done and None not in specs
    for spec in reversed(specs):
        coordinator.finish(ended(spec))
    assert len(coordinator.results) == 6
    coordinator.close()


def test_a_duplicate_of_a_finished_trial_is_recorded_and_not_run(bench):
    coordinator = bench.open(few_candidates(12))
    specs = drain(coordinator)
    coordinator.close()
    assert len(specs) <= 3
    rows = {row.trial_id: row for row in Store(bench.folder).read()}
    assert len(rows) == 12
    for row in rows.values():
        if row.status == TrialStatus.DUPLICATE:
            first = rows[row.message.split()[2]]
            assert row.message == f"same as {first.trial_id} (completed)"
            assert first.status == TrialStatus.COMPLETED and row.accuracy == first.accuracy
            assert row.finetune_s == 0 and not row.on_front and row.recipe is None
    assert sum(row.status == TrialStatus.DUPLICATE for row in rows.values()) == 12 - len(specs)


@pytest.mark.parametrize("end", ["completed", "failed"])
def test_a_duplicate_of_a_running_trial_waits_for_it(bench, end):
    coordinator = bench.open(few_candidates(12))
    specs = []
    while (spec := ask(coordinator)) is not None:
        specs.append(spec)
    assert len(specs) <= 3 and coordinator.results == {}
    for spec in specs:
        if end == "failed":
            coordinator.fail(spec.trial_id, "it broke")
        else:
            coordinator.finish(ended(spec))
    assert len(coordinator.results) == 12
    waited = [r for r in coordinator.results.values() if r.status == TrialStatus.DUPLICATE]
    assert len(waited) == 12 - len(specs)
    assert all(row.message.endswith(f"({end})") for row in waited)
    coordinator.close()


def test_the_time_limit_ends_the_proposals_but_not_the_running_trials(bench):
    coordinator = bench.open(config(50, time_limit_s=0.3, seeds=False))
    spec = ask(coordinator)
    time.sleep(0.35)
    assert coordinator.done and coordinator.next() is None and coordinator.remaining
    coordinator.finish(ended(spec))
    coordinator.close()
    assert [row.trial_id for row in Store(bench.folder).read()] == [spec.trial_id]


# --- restarting ------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_restart_proposes_exactly_what_is_missing(bench, plan, tmp_path, sampler):
    settings = config(10, sampler=sampler)
    undisturbed = Bench(plan, tmp_path / "undisturbed").open(settings)
    whole = drain(undisturbed)
    undisturbed.close()
    first = bench.open(settings)
    before = drain(first, most=4)
    lost = ask(first)  # running when the driver dies: nothing is closed
    second = bench.open(settings)
    assert second.remaining == 6 and len(second.results) == 4
    after = drain(second)
    second.close()
    first._pool.shutdown()
    assert before + after == whole and after[0] == lost
    assert len(Store(bench.folder).read()) == 10


def test_a_restart_knows_gaps_failures_duplicates_and_candidates(bench):
    settings = few_candidates(8)
    first = bench.open(settings)
    drain(first, most=1)
    second_spec = ask(first)
    first.fail(second_spec.trial_id, "it broke")
    first.close()
    known = dict(first.results)
    again = bench.open(settings)
    assert {k: r.status for k, r in again.results.items()} == {
        k: r.status for k, r in known.items()
    }
    specs = drain(again)
    again.close()
    keys = {spec.candidate.key for spec in specs}
    assert second_spec.candidate.key not in keys and len(specs) <= 1
    assert len(again.results) == 8


# --- recording -------------------------------------------------------------------------------


def test_fail_makes_a_row_and_the_search_goes_on(bench):
    coordinator = bench.open(config(3, seeds=False))
    spec = ask(coordinator)
    coordinator.fail(spec.trial_id, "the worker died in trial t00000: killed")
    drain(coordinator)
    coordinator.close()
    row = Store(bench.folder).read()[0]
    assert row.status == TrialStatus.FAILED and row.message.endswith("killed")
    assert row.candidate == spec.candidate_json and row.seed == spec.seed
    assert row.finished_at and not row.on_front
    assert len(coordinator.front) == 2


def finish_with_files(coordinator: Coordinator, folder: Path, accuracy: float) -> list[Path]:
    spec = ask(coordinator)
    result = ended(spec, accuracy, latency_ms=1.0)
    result.recipe, result.weights = f"recipes/{spec.trial_id}.json", f"weights/{spec.trial_id}"
    paths = [folder / result.recipe, folder / result.weights]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    coordinator.finish(result)
    return paths


def test_files_of_members_that_left_the_front_are_deleted(bench):
    coordinator = bench.open(config(4, seeds=False))
    files = [finish_with_files(coordinator, bench.folder, a) for a in (0.5, 0.7, 0.6, 0.9)]
    coordinator.close()
    assert [all(p.exists() for p in paths) for paths in files] == [False, False, False, True]
    assert not any(p.exists() for paths in files[:3] for p in paths)
    rows = Store(bench.folder).read()
    assert [row.recipe is not None for row in rows] == [False, False, False, True]
    assert [row.on_front for row in rows] == [False, False, False, True]
    assert [r.trial_id for r in read_results(bench.folder / "front.parquet")] == [trial_id(3)]


def test_the_front_in_the_ledger_is_right_without_a_close(bench):
    """After a crash no row may claim to be on a front that it has left."""
    coordinator = bench.open(config(3, seeds=False))
    for accuracy in (0.5, 0.7, 0.9):
        coordinator.finish(ended(ask(coordinator), accuracy))
    coordinator._pool.shutdown()
    assert [r.trial_id for r in read_results(bench.folder / "front.parquet")] == [trial_id(2)]
    assert [row.on_front for row in bench.open(config(3)).results.values()] == [False, False, True]
