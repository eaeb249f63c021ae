"""Ask and tell: repeatable by seed and history, and restored as if nothing had happened."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from helpers import ranked
from optuna.trial import TrialState

from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.models.build import build_model
from prunesearch.methods.surgery import PruningPlan
from prunesearch.search import sampler as module
from prunesearch.search.config import SearchConfig, parse_config
from prunesearch.search.records import FULL_FIDELITY, TrialResult, TrialStatus
from prunesearch.search.sampler import Proposal, Sampler, trial_seed
from prunesearch.search.seeds import make_seeds
from prunesearch.search.space import Space

SAMPLERS = ["surrogate", "tpe", "nsga2", "gp", "random"]
DENSE = {"accuracy": 1.0, "latency_ms": 1.0}
ORDER = ("layer2.1", "layer1.2", "layer3.1", "layer1.1")


@pytest.fixture(scope="module")
def plan() -> PruningPlan:
    return plan_pruning(build_model("resnet20", num_classes=10), torch.zeros(2, 3, 16, 16))


@pytest.fixture
def small_phases(monkeypatch):
    """Start-up phases and populations so small that a few trials reach the real samplers."""
    monkeypatch.setattr(module, "POPULATION", 6)
    monkeypatch.setattr(module, "GP_STARTUP", 4)


def config(sampler: str, **changes: Any) -> SearchConfig:
    data: dict[str, Any] = {"model": {"name": "resnet20"}, "data": {"name": "digits"}}
    data["search"] = {"sampler": sampler, "seed": 3, "trials": 60}
    data["constraints"] = ["accuracy_drop <= 0.3"]
    return parse_config(data | changes)


def new(plan: PruningPlan, sampler: str, num_seeds: int = 3, **changes: Any) -> Sampler:
    settings = config(sampler, **changes)
    space = Space(settings.space, plan, ranked(ORDER))
    return Sampler(space, settings, make_seeds(space, num_seeds), DENSE)


def outcome(proposal: Proposal) -> TrialResult:
    """A made-up but fixed result: a failure, an infeasible trial or a completed one."""
    number, candidate = proposal.number, proposal.candidate
    row = TrialResult(f"t{number}", TrialStatus.COMPLETED, finished_at=float(number))
    row.fidelity = FULL_FIDELITY
    if number % 7 == 5:
        return dataclasses.replace(row, status=TrialStatus.FAILED, message="broke")
    keep = [fraction for _, fraction in candidate.keep] or [candidate.k or 1.0]
    size = sum(keep) / len(keep) * (1 - 0.1 * len(candidate.dropped_blocks))
    row.accuracy, row.latency_ms, row.accuracy_drop = math.sqrt(size), size, 1 - math.sqrt(size)
    if row.accuracy_drop > 0.3:
        row.status = TrialStatus.INFEASIBLE
    return row


def study(sampler: Sampler, numbers: range) -> list[tuple[Proposal, TrialResult]]:
    history = []
    for number in numbers:
        proposal = sampler.ask(number)
        result = outcome(proposal)
        sampler.tell(number, result)
        history.append((proposal, result))
    return history


def told(sampler: Sampler) -> list[Any]:
    """The trials that the study has learned of by the next ask."""
    sampler.ask(len(sampler._asked))
    return [t for t in sampler._learner.study.trials if t.state.is_finished()]


def stored(proposal: Proposal) -> Proposal:
    """The proposal as it comes back from the ledger's JSON."""
    return dataclasses.replace(proposal, **json.loads(json.dumps(proposal.provenance())))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seed_and_history_give_the_same_proposals(plan, name, small_phases):
    count = {"gp": 6, "surrogate": 10}.get(name, 16)
    first, second = (study(new(plan, name), range(count)) for _ in range(2))
    assert [p for p, _ in first] == [p for p, _ in second]
    assert len({p.candidate for p, _ in first}) > count // 2
    other = new(plan, name, search={"sampler": name, "seed": 4, "trials": 60})
    assert [p.params for p, _ in study(other, range(4))[3:]] != [first[3][0].params]


@pytest.mark.parametrize("name", ["surrogate", "tpe", "nsga2", "random"])
@pytest.mark.parametrize("cut", [2, 13])
def test_a_restored_study_continues_as_an_undisturbed_one(plan, name, cut, small_phases):
    count = 18 if name == "surrogate" else 24
    undisturbed = study(new(plan, name), range(count))
    restored = new(plan, name)
    for proposal, result in undisturbed[:cut]:
        restored.restore(stored(proposal), result)
    assert study(restored, range(cut, count)) == undisturbed[cut:]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_trial_told_again_counts_with_its_last_result(plan, name, small_phases):
    """What a rung of the ladder reported is replaced when the trial goes on."""
    twice, once = new(plan, name), new(plan, name)
    for number in range(8):
        proposal = twice.ask(number)
        assert once.ask(number).params == proposal.params
        last = outcome(proposal)
        first = dataclasses.replace(last, status=TrialStatus.EARLY_STOPPED, fidelity=0)
        if first.accuracy is not None:
            first.accuracy /= 2
        twice.tell(number, first)
        twice.tell(number, last)
        once.tell(number, last)
    later, same = twice.ask(8), once.ask(8)
    if name != "nsga2":  # which counts rebuilt trials in another order
        assert later.params == same.params


def test_a_restored_ladder_continues_as_the_live_one(plan):
    """Trials that were completed out of order fit the same models after a restart."""

    def waits(result: TrialResult) -> TrialResult:
        return dataclasses.replace(result, status=TrialStatus.EARLY_STOPPED, fidelity=0)

    live, restored = new(plan, "surrogate"), new(plan, "surrogate")
    history = {}
    for number in range(20):
        proposal = live.ask(number)
        last = outcome(proposal)
        last.accuracy_before_finetune = (last.accuracy or 0.0) / 2
        done = number % 2 == 0 or last.status == TrialStatus.FAILED
        history[number] = proposal, last if done else waits(last)
        live.tell(number, history[number][1])
        late = number - 5
        if late >= 0 and history[late][1].status == TrialStatus.EARLY_STOPPED and late % 3 == 0:
            history[late] = history[late][0], outcome(history[late][0])
            history[late][1].accuracy_before_finetune = (history[late][1].accuracy or 0.0) / 2
            live.tell(late, history[late][1])
    for proposal, result in history.values():
        restored.restore(stored(proposal), result)
    assert restored.ask(20) == live.ask(20)


def test_a_slow_sampler_is_stood_in_for_at_random(plan):
    sampler = new(plan, "surrogate", num_seeds=0)
    proposal = sampler.ask_cheap(0)
    assert (proposal.number, proposal.origin) == (0, module.SUBSTITUTE)
    sampler.tell(0, outcome(proposal))
    assert sampler.ask(1).candidate != proposal.candidate


def test_nsga2_counts_every_trial_into_a_generation_seeds_too(plan, small_phases):
    history = study(new(plan, "nsga2"), range(20))
    generations = [g for p, _ in history for g in p.sampler_attrs.values()]
    assert len(generations) == len(history) and generations == sorted(generations)
    assert generations[2] == 0 and generations[-1] >= 2


def test_what_was_told_matters(plan):
    """Different results make different proposals: the sampler does learn."""
    first, second = new(plan, "tpe"), new(plan, "tpe")
    study(first, range(14))
    for number in range(14):
        result = outcome(second.ask(number))
        if result.accuracy is not None:
            result.accuracy = result.latency_ms = 1 - result.accuracy
        second.tell(number, result)
    assert first.ask(14).params != second.ask(14).params


def test_seeds_come_first_and_are_taken_exactly(plan):
    sampler = new(plan, "random")
    seeds = make_seeds(sampler._space, 3)
    proposals = [sampler.ask(number) for number in range(5)]
    assert [p.origin for p in proposals] == [*(s.origin for s in seeds), "random", "random"]
    assert [p.params for p in proposals[:3]] == [s.params for s in seeds]
    assert [p.number for p in proposals] == list(range(5))


def test_an_open_trial_of_another_worker_does_not_stop_asking(plan, small_phases):
    for name in SAMPLERS:
        sampler = new(plan, name, num_seeds=1)
        proposals = {number: sampler.ask(number) for number in range(4)}
        for number in (2, 0, 3, 1):
            sampler.tell(number, outcome(proposals[number]))
        assert sampler.ask(4).number == 4


@pytest.mark.parametrize("name", SAMPLERS[1:])
def test_constraints_and_failures_are_told(plan, name, small_phases):
    """Told live or restored, the study knows the state, the values and the violations."""
    live, restored = new(plan, name), new(plan, name)
    history = study(live, range(6))
    for proposal, result in history:
        restored.restore(stored(proposal), result)
    assert {r.status for _, r in history} >= {TrialStatus.FAILED, TrialStatus.COMPLETED}
    for sampler in (live, restored):
        for trial, (_, result) in zip(told(sampler), history, strict=False):
            if result.status == TrialStatus.FAILED:
                assert trial.state == TrialState.FAIL and trial.values is None
                continue
            assert trial.state == TrialState.COMPLETE
            assert trial.values == [result.accuracy, result.latency_ms]
            assert trial.constraints == {"accuracy_drop <= 0.3": result.accuracy_drop - 0.3}


def test_a_trial_without_an_objective_counts_as_failed(plan):
    sampler = new(plan, "tpe")
    result = outcome(sampler.ask(0))
    result.latency_ms = None
    sampler.tell(0, result)
    assert told(sampler)[0].state == TrialState.FAIL


def test_every_trial_has_a_seed_of_its_own():
    seeds = {trial_seed(seed, number) for seed in range(20) for number in range(200)}
    assert len(seeds) == 4000 and all(0 <= seed < 2**31 for seed in seeds)
    assert trial_seed(2**32 - 1, 10**5) < 2**31
