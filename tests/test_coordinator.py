"""The coordinator: every trial once, every end a row, and the ledger is the truth."""

import collections
import dataclasses
import io
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ranked
from rich.console import Console

from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.models.build import build_model
from prunesearch.methods.surgery import PruningPlan
from prunesearch.search.asking import AskAhead
from prunesearch.search.config import SearchConfig, dump_config, parse_config
from prunesearch.search.context import TrialSpec
from prunesearch.search.coordinator import HOPELESS, Coordinator
from prunesearch.search.dense import Baseline
from prunesearch.search.records import TrialResult, TrialStatus
from prunesearch.search.rows import trial_id
from prunesearch.search.runs import Run
from prunesearch.search.sampler import SUBSTITUTE, Proposal, Sampler
from prunesearch.search.space import Space
from prunesearch.search.store import RUNGS, LedgerError, Store, read_results
from prunesearch.search.tables import runs_table, status_of, status_table

BASELINE = Baseline(0.9, 0.3, 1000, 100, 1.0, "trained", 1, 0.0, latency_ms=2.0)
BLOCKS = ("layer1.1", "layer2.1")
DENSE = dataclasses.asdict(BASELINE)


@pytest.fixture(scope="module")
def plan() -> PruningPlan:
    return plan_pruning(build_model("resnet20", num_classes=10), torch.zeros(2, 3, 16, 16))


def config(trials: int = 8, *, max_retries: int = 0, **search: Any) -> SearchConfig:
    return parse_config(
        {
            "resources": {"max_retries": max_retries},
            "model": {"name": "resnet20"},
            "data": {"name": "digits"},
            "space": {"criteria": ["magnitude_l1"], "select": ["ratio"]},
            "search": {"sampler": "random", "trials": trials, "early_stop": False, **search},
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


def test_what_is_asked_to_stop_starts_nothing_more(bench):
    coordinator = bench.open(config(50, seeds=False))
    spec = ask(coordinator)
    coordinator.stop("interrupted")
    assert coordinator.done and coordinator.stopped == "interrupted"
    assert coordinator.next() is None
    coordinator.finish(ended(spec))
    coordinator.close()
    assert [row.trial_id for row in Store(bench.folder).read()] == [spec.trial_id]


def test_a_search_in_which_all_fails_stops_early_and_says_why(bench):
    coordinator = bench.open(config(50, seeds=False))
    for _ in range(HOPELESS):
        assert coordinator.stopped is None
        coordinator.fail(ask(coordinator).trial_id, "no space left on device")
    assert coordinator.done and coordinator.next() is None
    assert "no space left on device" in coordinator.stopped
    coordinator.close()
    again = bench.open(config(50, seeds=False))  # the cause may be mended
    assert again.stopped is None
    again.finish(ended(ask(again)))
    for _ in range(HOPELESS):
        again.fail(ask(again).trial_id, "a bad candidate")
    assert again.stopped is None  # one has succeeded
    again.close()


# --- the ladder ------------------------------------------------------------------------------


def reached(spec: TrialSpec) -> TrialResult:
    """The trial at the fidelity asked for: more accurate with each, and with fewer blocks."""
    draw = (spec.seed % 97) / 97
    known = [0.1 + 0.6 * draw, 0.3 + 0.5 * draw, 0.5 + 0.4 * draw][: spec.fidelity + 1]
    result = ended(spec, known[-1], latency_ms=1.0 + ((spec.seed * 31) % 89) / 89)
    result.accuracy_by_fidelity, result.fidelity = list(known), spec.fidelity
    if spec.fidelity < 2:
        result.status = TrialStatus.EARLY_STOPPED
    return result


def climb(coordinator: Coordinator, most: int = 1000) -> list[tuple[str, int, str]]:
    """Runs up to `most` rungs one after the other."""
    jobs: list[tuple[str, int, str]] = []
    while len(jobs) < most and (spec := ask(coordinator)) is not None:
        jobs.append((spec.trial_id, spec.fidelity, spec.candidate_json))
        if spec.fidelity == 1:
            checkpoint(coordinator, spec)
        coordinator.finish(reached(spec))
    return jobs


def checkpoint(coordinator: Coordinator, spec: TrialSpec) -> None:
    """As a worker leaves it with the keeper."""
    folder = coordinator.store.run_dir / RUNGS
    folder.mkdir(exist_ok=True)
    for ending in ("json", "safetensors"):
        (folder / f"{spec.trial_id}.{ending}").write_text("{}")


def test_only_promising_trials_reach_the_full_budget(bench):
    coordinator = bench.open(config(20, seeds=False, early_stop=True))
    jobs = climb(coordinator)
    assert coordinator.done and coordinator.num_promotable == 0
    places = [(trial, fidelity) for trial, fidelity, _ in jobs]
    assert len(set(places)) == len(places)
    count = collections.Counter(fidelity for _, fidelity in places)
    assert count[0] == 20 > count[1] > count[2] > 0
    for trial, fidelity in places:
        assert fidelity == 0 or places.index((trial, fidelity - 1)) < places.index(
            (trial, fidelity)
        )
    assert {r.status for r in coordinator.front} == {TrialStatus.COMPLETED}
    assert coordinator.counts[TrialStatus.COMPLETED] == count[2]
    waiting = {r.trial_id for r in coordinator.results.values() if r.fidelity == 1}
    assert waiting and {p.stem for p in (bench.folder / RUNGS).iterdir()} == waiting
    coordinator.close()
    assert not list((bench.folder / RUNGS).iterdir())  # nobody will ask for them
    rows = Store(bench.folder).read()
    assert len(rows) == 20 == sum(coordinator.counts.values())
    assert {r.trial_id: r.fidelity for r in rows} == {
        trial: max(f for t, f in places if t == trial) for trial, _ in places
    }


def test_a_free_worker_gets_work_while_there_is_any(bench):
    coordinator = bench.open(config(9, seeds=False, early_stop=True))
    running: list[TrialSpec] = []
    for turn in range(60):
        while len(running) < 3 and (spec := ask_now(coordinator)) is not None:
            running.append(spec)
        if not running:
            break
        assert not coordinator.done
        assert len(running) == 3 or not (coordinator.remaining or coordinator.num_promotable)
        coordinator.finish(reached(running.pop(turn % len(running))))
    assert coordinator.done and len(coordinator.results) == 9
    coordinator.close()


def ask_now(coordinator: Coordinator) -> TrialSpec | None:
    """The next trial; None when all that is to come depends on those that run."""
    while (spec := coordinator.next()) is None:
        if coordinator.stopped or not coordinator.remaining:
            return None
        time.sleep(0.01)
    return spec


@pytest.mark.parametrize("after", [1, 7, 15])
def test_a_restart_goes_on_with_the_promotions(bench, plan, tmp_path, after):
    settings = config(12, sampler="tpe", early_stop=True)
    undisturbed = Bench(plan, tmp_path / "undisturbed").open(settings)
    whole = climb(undisturbed)
    undisturbed.close()
    first = bench.open(settings)
    before = climb(first, most=after)
    lost = ask(first)  # running when the driver dies: nothing is closed
    orphan = dataclasses.replace(lost, trial_id="t99999")
    checkpoint(first, orphan)
    second = bench.open(settings)
    assert not list((bench.folder / RUNGS).glob("t99999*"))
    assert before + climb(second) == whole
    first._asking.close()
    second.close()
    assert {r.trial_id: r.accuracy_by_fidelity for r in Store(bench.folder).read()} == {
        r.trial_id: r.accuracy_by_fidelity for r in undisturbed.results.values()
    }


def test_duplicates_follow_the_trial_that_they_repeat(bench):
    settings = few_candidates(12, early_stop=True)
    first = bench.open(settings)
    jobs = climb(first, most=2)
    first._asking.close()
    again = bench.open(settings)
    jobs += climb(again)
    again.close()
    assert len(jobs) <= 9
    rows = {row.trial_id: row for row in Store(bench.folder).read()}
    copies = [row for row in rows.values() if row.status is TrialStatus.DUPLICATE]
    assert len(copies) == 12 - len({trial for trial, *_ in jobs}) and copies
    for row in copies:
        original = rows[row.message.split()[2]]
        assert row.message == f"same as {original.trial_id} ({original.status})"
        assert row.accuracy_by_fidelity == original.accuracy_by_fidelity


def test_a_duplicate_that_a_crash_left_behind_follows_too(bench):
    settings = few_candidates(12, early_stop=True)
    first = bench.open(settings)
    climb(first)
    first._asking.close()
    ends = {row.trial_id: row for row in Store(bench.folder).read()}
    copies = [row for row in ends.values() if row.message.endswith("(completed)")]
    for row in copies:  # as they were before their first trial was promoted
        first.store.write_trial(
            dataclasses.replace(row, fidelity=0, message=f"{row.message[:14]} (early_stopped)")
        )
    again = bench.open(settings)
    again._asking.close()
    assert copies
    for known in (again.results, {row.trial_id: row for row in Store(bench.folder).read()}):
        for row in copies:
            found = known[row.trial_id]
            assert (found.fidelity, found.message) == (row.fidelity, row.message)
    assert again.counts == first.counts


def test_a_worker_that_dies_on_the_way_up_loses_no_row(bench):
    coordinator = bench.open(config(3, seeds=False, early_stop=True))
    coordinator.finish(reached(ask(coordinator)))
    spec = ask(coordinator)
    assert (spec.trial_id, spec.fidelity, spec.row.fidelity) == ("t00000", 1, 0)
    coordinator.fail(spec.trial_id, "killed")
    row = coordinator.results["t00000"]
    assert row.status is TrialStatus.FAILED and row.message == "killed"
    assert row.accuracy_by_fidelity == spec.row.accuracy_by_fidelity
    assert {trial for trial, *_ in climb(coordinator)} == {"t00001", "t00002"}
    coordinator.close()


def printed(status: dict[str, Any]) -> str:
    """Both tables that show how far a run is; only one of them may not know it."""
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(status_table(status))
    one = console.export_text()
    console.print(runs_table([status], Path("results")))
    assert ("go on" in one) == ("go on" in console.export_text())
    return one


def test_a_run_that_stops_early_is_not_finished(bench):
    settings = config(4, seeds=False, early_stop=True)
    (bench.folder / "config.yaml").write_text(dump_config(settings))
    coordinator = bench.open(settings)
    for _ in range(40):
        assert not Run(bench.folder).finished
        status = status_of(Run(bench.folder))
        assert status["waiting"] == coordinator.num_promotable
        assert (coordinator.num_promotable > 0) == ("go on" in printed(status))
        if climb(coordinator, most=1) and coordinator.done:
            break
    coordinator.close()
    assert Run(bench.folder).finished


# --- asking ahead ----------------------------------------------------------------------------


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_with_several_slots_proposals_lie_ready(bench):
    coordinator = bench.open(config(12, seeds=False))
    coordinator.expect(16)
    specs = [ask(coordinator)]
    wait_until(lambda: len(coordinator._asking._ready) == 2)
    assert coordinator.remaining == 11
    specs += [ask(coordinator) for _ in range(11)]
    assert [spec.trial_id for spec in specs] == [trial_id(n) for n in range(12)]
    for spec in specs:
        coordinator.finish(ended(spec))
    coordinator.close()


class SlowSampler(Sampler):
    """Thinks about each question until it is allowed to answer."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.go = threading.Semaphore(0)

    def ask(self, number: int) -> Proposal:
        assert self.go.acquire(timeout=20)
        return super().ask(number)


def slow(bench: Bench, settings: SearchConfig, slots: int) -> tuple[AskAhead, SlowSampler]:
    space = Space(settings.space, bench.plan, ranked(BLOCKS))
    sampler = SlowSampler(space, settings, [], DENSE)
    asking = AskAhead(sampler, settings, range(settings.search.trials))
    asking.expect(slots)
    return asking, sampler


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_a_random_candidate_steps_in_for_a_slow_sampler(bench, name):
    settings = config(4, sampler=name, ask_timeout_s=0.1)
    asking, sampler = slow(bench, settings, slots=2)
    assert asking.next(0.01) is None  # not yet
    found: list[Proposal | None] = []
    wait_until(lambda: (found.append(asking.next(0.05)) or found[-1]) is not None)
    (substitute,) = [proposal for proposal in found if proposal is not None]
    assert (substitute.number, substitute.origin) == (1, SUBSTITUTE) and asking.remaining == 3
    row = TrialResult("t00001", TrialStatus.COMPLETED, accuracy=0.5, latency_ms=1.0)
    asking.tell(substitute, row)
    for _ in range(3):
        sampler.go.release()
    others = []
    wait_until(lambda: (others.append(asking.next(1.0)) or asking.remaining) == 0)
    assert [p.number for p in others if p] == [0, 2, 3]
    assert {p.origin for p in others if p} == {name}
    asking.close()
    sampler.go.release()
    sampler.ask(4)  # reads what it was told
    assert [t.values for t in sampler._learner.study.get_trials() if t.values] == [[0.5, 1.0]]


def test_one_slot_waits_for_its_sampler(bench):
    """A seed gives one search, so nothing that depends on the clock may step in."""
    asking, sampler = slow(bench, config(2, ask_timeout_s=0.01), slots=1)
    assert [asking.next(0.02) for _ in range(5)] == [None] * 5
    sampler.go.release()
    assert asking.next(20).number == 0
    assert asking.remaining == 1 and not asking._busy  # nothing is asked ahead
    asking.close()


def test_an_error_of_the_sampler_is_raised(bench):
    settings = config(3)
    space = Space(settings.space, bench.plan, ranked(BLOCKS))
    sampler = Sampler(space, settings, [], DENSE)
    sampler.ask = lambda number: 1 / 0  # type: ignore[method-assign]
    asking = AskAhead(sampler, settings, range(3))
    with pytest.raises(ZeroDivisionError):
        asking.next(20)
    asking.close()


def test_an_error_while_asking_ahead_is_raised_and_loses_no_trial(bench):
    settings = config(8)
    sampler = Sampler(Space(settings.space, bench.plan, ranked(BLOCKS)), settings, [], DENSE)
    ask_well = sampler.ask
    sampler.ask = lambda number: ask_well(number if number < 2 else 1 // 0)  # type: ignore[method-assign]
    asking = AskAhead(sampler, settings, range(8))
    asking.expect(16)
    assert asking.next(20).number == 0  # the third question fails meanwhile
    wait_until(lambda: not asking._busy)
    assert asking.remaining == 7
    with pytest.raises(ZeroDivisionError):
        asking.next(20)
    with pytest.raises(ZeroDivisionError):
        asking.prepare()
    assert asking.remaining == 7
    asking.close()


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
    first._asking.close()
    assert before + after == whole and after[0] == lost
    assert len(Store(bench.folder).read()) == 10


def test_a_clock_that_jumps_changes_nothing(bench, plan, tmp_path):
    """Backwards by an hour in mid-run: the restart proposes what an undisturbed run would."""
    settings = config(12, sampler="surrogate", early_stop=True)
    undisturbed = Bench(plan, tmp_path / "steady").open(settings)
    climb(undisturbed)
    undisturbed.close()
    first = bench.open(settings)
    climb(first, 9)
    first.close()
    for row in Store(bench.folder).read()[::2]:
        first.store.write_trial(dataclasses.replace(row, finished_at=row.finished_at - 3600))
    again = bench.open(settings)
    climb(again)
    again.close()
    rows = [(row.trial_id, row.status, row.candidate, row.accuracy) for row in (
        again.results[name] for name in sorted(again.results)
    )]  # fmt: skip
    assert rows == [
        (row.trial_id, row.status, row.candidate, row.accuracy)
        for row in (undisturbed.results[name] for name in sorted(undisturbed.results))
    ]


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


def test_what_came_from_outside_is_tried_again_as_often_as_the_config_says(bench):
    coordinator = bench.open(config(3, seeds=False, max_retries=2))
    spec = ask(coordinator)
    for attempt in range(2):
        coordinator.fail(spec.trial_id, "its node was lost", again=True)
        assert not coordinator.results and not coordinator.done
        again = ask(coordinator)
        assert again == spec, attempt
    coordinator.fail(spec.trial_id, "its worker was killed", again=True)
    row = coordinator.results[spec.trial_id]
    assert row.status is TrialStatus.FAILED
    assert row.message == "its worker was killed; attempt 3, after: its node was lost"
    second = ask(coordinator)
    coordinator.fail(second.trial_id, "its node was lost", again=True)
    assert ask(coordinator) == second
    coordinator.finish(ended(second))
    row = coordinator.results[second.trial_id]
    assert row.status is TrialStatus.COMPLETED
    assert row.message == "attempt 2, after: its node was lost"
    assert len(drain(coordinator)) == 1 and coordinator.done
    coordinator.close()


def test_a_stop_leaves_a_trial_that_waits_for_another_attempt_to_the_resume(bench):
    coordinator = bench.open(config(2, seeds=False, max_retries=2))
    spec = ask(coordinator)
    coordinator.fail(spec.trial_id, "its node was lost", again=True)
    coordinator.stop("asked to")
    assert coordinator.done and coordinator.next() is None and coordinator.stopped == "asked to"
    coordinator.close()
    again = bench.open(config(2, seeds=False))
    assert [s.trial_id for s in drain(again)] == [trial_id(0), trial_id(1)]
    again.close()


def test_a_folder_that_cannot_be_written_breaks_the_search_off_and_loses_nothing(bench):
    """What ended meanwhile is stored as soon as that can be done, at the latest by a resume."""
    coordinator = bench.open(config(4, seeds=False))
    first, second = ask(coordinator), ask(coordinator)
    coordinator.finish(ended(first))
    trials = coordinator.store.trials_dir
    trials.rename(trials.with_name("aside"))
    trials.write_text("a file where the folder was")  # root may write where permissions forbid it
    coordinator.finish(ended(second))
    assert coordinator.done and "cannot be written" in coordinator.stopped
    with pytest.raises(LedgerError, match="cannot be written"):
        coordinator.close()
    trials.unlink()
    trials.with_name("aside").rename(trials)
    assert [row.trial_id for row in Store(bench.folder).read()] == [first.trial_id]
    again = bench.open(config(4, seeds=False))
    assert [s.trial_id for s in drain(again)] == [trial_id(n) for n in (1, 2, 3)]
    again.close()


def test_a_row_that_could_not_be_stored_is_stored_at_the_end(bench):
    coordinator = bench.open(config(4, seeds=False))
    spec = ask(coordinator)
    trials = coordinator.store.trials_dir
    trials.parent.mkdir(parents=True, exist_ok=True)
    trials.write_text("a file where the folder was")
    coordinator.finish(ended(spec))
    trials.unlink()
    with pytest.raises(LedgerError):  # the search is not over, and must not look so
        coordinator.close()
    assert [row.trial_id for row in Store(bench.folder).read()] == [spec.trial_id]


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
    coordinator._asking.close()
    assert [r.trial_id for r in read_results(bench.folder / "front.parquet")] == [trial_id(2)]
    assert [row.on_front for row in bench.open(config(3)).results.values()] == [False, False, True]


def test_of_equal_points_the_first_trial_is_on_the_front_whichever_ends_first(bench):
    """A reader of the ledger sees the trials in the order of their names."""
    coordinator = bench.open(config(2, seeds=False))
    specs = [ask(coordinator), ask(coordinator)]
    for spec in reversed(specs):
        coordinator.finish(ended(spec))
    coordinator.close()
    assert [r.trial_id for r in coordinator.front] == [trial_id(0)]
    assert [row.on_front for row in Store(bench.folder).read()] == [True, False]


def test_a_run_that_another_driver_has_taken_over_is_left_to_it(bench):
    late = bench.open(config(8))
    drain(late, most=2)
    running = ask(late)
    late.abandon("taken over")
    other = bench.open(config(8))
    drain(other)
    files = {path: path.read_bytes() for path in bench.folder.rglob("*") if path.is_file()}
    late.fail(running.trial_id, "too late")
    assert ask(late) is None and late.stopped == "taken over"
    late.close()
    other_rows = Store(bench.folder).read()
    assert {str(row.status) for row in other_rows} == {"completed"} and len(other_rows) == 8
    assert files == {p: p.read_bytes() for p in bench.folder.rglob("*") if p.is_file()}
    other.close()


def test_many_trials_are_compacted_a_few_at_a_time(bench, monkeypatch):
    monkeypatch.setattr("prunesearch.search.coordinator.COMPACT_EVERY", 4)
    coordinator = bench.open(config(10, seeds=False))
    drain(coordinator)
    names = sorted(path.name for path in (bench.folder / "trials").glob("compact-*"))
    assert names == ["compact-1.parquet", "compact-2.parquet"]
    coordinator.close()
    assert [path.name for path in (bench.folder / "trials").iterdir()] == ["compact-3.parquet"]
    assert len(Store(bench.folder).read()) == 10


# --- the plateau -----------------------------------------------------------------------------


def grow(coordinator: Coordinator, accuracies: list[float]) -> int:
    """Runs trials of these accuracies until the coordinator proposes no more."""
    for count, accuracy in enumerate(accuracies):
        if (spec := ask(coordinator)) is None:
            return count
        coordinator.finish(ended(spec, accuracy))
    return len(accuracies)


def test_a_front_that_stands_still_ends_the_search(bench):
    settings = config(50, seeds=False, plateau_trials=3, plateau_gain=0.01)
    coordinator = bench.open(settings)
    # a gain of 2 % in all within three trials, then none
    assert grow(coordinator, [0.5, 0.502, 0.505, 0.51] + [0.1] * 20) == 6
    assert coordinator.done and coordinator.remaining == 44
    assert "no more than 1.00% over 3 trials" in coordinator.stopped
    coordinator.close()
    again = bench.open(settings)  # a resumed run does nothing
    assert again.done and again.stopped == coordinator.stopped and again.next() is None
    again.close()
    extended = bench.open(config(50, seeds=False, plateau_trials=3, plateau_after=6))
    assert not extended.done
    assert grow(extended, [0.1] * 20) == 3
    extended.close()


def test_a_trial_that_runs_at_the_plateau_ends_well(bench):
    coordinator = bench.open(config(50, seeds=False, plateau_trials=1))
    specs = [ask(coordinator) for _ in range(3)]
    for spec, accuracy in zip(specs, (0.5, 0.5, 0.9), strict=True):
        coordinator.finish(ended(spec, accuracy))
    assert coordinator.done and len(coordinator.results) == 3
    assert coordinator.front[0].accuracy == 0.9
    coordinator.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_restart_sees_the_plateau_that_the_run_saw(bench, seed):
    draw = random.Random(seed)
    settings = config(20, seeds=False, early_stop=True, plateau_trials=2, plateau_gain=1.0)
    live = bench.open(settings)
    running: list[TrialSpec] = []
    while True:
        while len(running) < 3 and (spec := ask_now(live)) is not None:
            running.append(spec)
        if not running:
            break
        live.finish(reached(running.pop(draw.randrange(len(running)))))
        if draw.random() < 0.3 or live.done:
            again = bench.open(settings)
            again._asking.close()
            assert (again._plateau._seen, again._plateau._volumes, again._plateau.reached) == (
                live._plateau._seen, live._plateau._volumes, live._plateau.reached
            )  # fmt: skip
    ended_trials = [r for r in live.results.values() if r.status is TrialStatus.COMPLETED]
    assert live._plateau._seen == len(ended_trials) > 2 and live._plateau.reached
    live.close()


def test_without_a_front_there_is_no_plateau(bench):
    coordinator = bench.open(config(6, seeds=False, plateau_trials=2))
    while (spec := ask(coordinator)) is not None:
        coordinator.fail(spec.trial_id, "it broke")
    assert len(coordinator.results) == 6 and coordinator.stopped is None
    coordinator.close()
