"""Ask and tell: seeds first, then the surrogate or an Optuna sampler.

What trial `n` is asked depends on the seed, on `n` and on what was told before, and on nothing
else: random states are set anew for each trial, so a resumed search continues as the undisturbed
one would. `ask` may run in a thread of its own: what is told meanwhile waits until the next ask.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from .config import SearchConfig
from .early_stop import RISING
from .front import reference_point
from .metrics import metrics_of
from .records import FULL_FIDELITY, Candidate, TrialResult, TrialStatus, violations
from .seeds import Seed
from .space import Params, Space
from .surrogate.features import Hints
from .surrogate.proposer import Observation, SurrogateProposer
from .surrogate.variation import Variation

POPULATION = 20  # NSGA-II: small, since a search has tens to hundreds of trials
GP_STARTUP = 12
SURROGATE = "surrogate"
SUBSTITUTE = "random: the sampler was slow"

Told = tuple["Proposal", TrialResult]


@dataclass(frozen=True)
class Proposal:
    """What the sampler wants tried as trial `number`."""

    number: int
    origin: str
    params: Params
    candidate: Candidate
    sampler_attrs: dict[str, Any]

    def provenance(self) -> dict[str, Any]:
        """What the ledger keeps of a proposal beside its candidate."""
        return {name: getattr(self, name) for name in ("origin", "params", "sampler_attrs")}


class Sampler:
    """Seeds, and what proposes after them, behind ask, tell and restore.

    Args:
        space: The search space.
        config: Names objectives, constraints, the sampler and its seed.
        seeds: Tried first, in this order.
        baseline: The dense model's metrics; they bound the hypervolume that is searched for.
        hints: What the surrogate may know of a candidate without a trial.
    """

    def __init__(
        self,
        space: Space,
        config: SearchConfig,
        seeds: Sequence[Seed],
        baseline: Mapping[str, float],
        hints: Hints | None = None,
    ) -> None:
        self._space = space
        self._name = config.search.sampler
        self._seed = config.search.seed
        self._seeds = list(seeds)
        self._asked: dict[int, Proposal] = {}
        self._taken: set[Candidate] = set()
        self._running: dict[int, Proposal] = {}
        self._told: dict[int, Told] = {}
        self._lock = threading.Lock()
        self._learner: _Learner = (
            _Surrogate(space, config, baseline, hints)
            if self._name == SURROGATE
            else _Optuna(space, config)
        )

    def ask(self, number: int) -> Proposal:
        """Proposes trial `number`: a seed while there are some, then what the sampler likes."""
        with self._lock:
            told, self._told = self._told, {}
            running = list(self._running.values())
            taken = self._taken.copy()  # hashing all of them anew would grow with the search
        self._learner.learn(list(told.values()))
        seed = self._seeds.pop(0) if self._seeds else None
        params, attrs = self._learner.propose(
            number, seed.params if seed else None, running, taken, trial_seed(self._seed, number)
        )
        return self._start(number, seed.origin if seed else self._name, params, attrs)

    def ask_cheap(self, number: int) -> Proposal:
        """Proposes at random, at once: for a worker that would wait for the sampler."""
        rng = np.random.default_rng(trial_seed(self._seed, number))
        return self._start(number, SUBSTITUTE, Variation(self._space, rng).random(), {})

    def tell(self, number: int, result: TrialResult) -> None:
        """Reports how far trial `number` came; later reports take the place of earlier ones.

        A failure teaches the sampler to stay away.
        """
        with self._lock:
            self._running.pop(number, None)
            self._told[number] = self._asked[number], result

    def restore(self, proposal: Proposal, result: TrialResult) -> None:
        """Adds a trial of an earlier session; call in the order of the trials.

        One that the space does not hold (any more) is remembered as tried and teaches nothing.
        """
        self._seeds = [seed for seed in self._seeds if seed.params != proposal.params]
        self._asked[proposal.number] = proposal
        self._taken.add(proposal.candidate)
        if self._space.means(proposal.params, proposal.candidate):
            self.tell(proposal.number, result)

    def _start(self, number: int, origin: str, params: Params, attrs: dict[str, Any]) -> Proposal:
        proposal = Proposal(number, origin, params, self._space.candidate(params), attrs)
        with self._lock:
            self._asked[number] = self._running[number] = proposal
            self._taken.add(proposal.candidate)
        return proposal


class _Learner(Protocol):
    """What proposes after the seeds."""

    def learn(self, told: Sequence[Told]) -> None:
        """Takes one result a trial; it replaces an earlier one."""

    def propose(
        self,
        number: int,
        params: Params | None,
        running: Sequence[Proposal],
        taken: Collection[Candidate],
        seed: int,
    ) -> tuple[Params, dict[str, Any]]:
        """Parameters of trial `number` (`params` if given) and what the ledger keeps of them."""


class _Surrogate:
    """Gaussian processes and expected hypervolume improvement."""

    def __init__(
        self,
        space: Space,
        config: SearchConfig,
        baseline: Mapping[str, float],
        hints: Hints | None,
    ) -> None:
        objectives = config.objectives
        worst = dict(zip(objectives, reference_point(baseline, objectives), strict=True))
        self._proposer = SurrogateProposer(space, objectives, config.constraints, worst, hints)
        self._worst = {name: value for name, value in worst.items() if name in RISING}
        self._metrics = metrics_of(config.probes)
        self._observations: dict[int, Observation] = {}

    def learn(self, told: Sequence[Told]) -> None:
        for proposal, result in told:
            self._observations.pop(proposal.number, None)
            if result.status == TrialStatus.DUPLICATE:
                continue
            if result.status == TrialStatus.FAILED:
                self._observations[proposal.number] = Observation(
                    proposal.params, proposal.candidate, self._worst, 0.0
                )
                continue
            measured = {name: result.metric(name) for name in self._metrics}
            if result.status != TrialStatus.COMPLETED and result.fidelity < FULL_FIDELITY:
                measured |= dict.fromkeys(RISING)
            self._observations[proposal.number] = Observation(
                proposal.params,
                proposal.candidate,
                {name: value for name, value in measured.items() if value is not None},
                result.accuracy_before_finetune,
            )

    def propose(
        self,
        number: int,
        params: Params | None,
        running: Sequence[Proposal],
        taken: Collection[Candidate],
        seed: int,
    ) -> tuple[Params, dict[str, Any]]:
        if params is None:
            known = [self._observations[n] for n in sorted(self._observations)]
            open_ = [(proposal.params, proposal.candidate) for proposal in running]
            params = self._proposer.propose(known, open_, taken, seed)
        return params, {}


class _Optuna:
    """One study in memory, made anew when a trial is told again."""

    def __init__(self, space: Space, config: SearchConfig) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._objectives = config.objectives
        self._constraints = config.constraints
        self._name = config.search.sampler
        self._open: dict[int, optuna.trial.Trial] = {}
        self._told: dict[int, Told] = {}
        self.study = self._new_study()

    def learn(self, told: Sequence[Told]) -> None:
        again = any(proposal.number in self._told for proposal, _ in told)
        self._told |= {proposal.number: (proposal, result) for proposal, result in told}
        if again:  # a finished trial of a study cannot be changed
            self._open.clear()
            self.study = self._new_study()
            told = [self._told[number] for number in sorted(self._told)]
        for proposal, result in told:
            self._add(proposal, result)

    def propose(
        self,
        number: int,
        params: Params | None,
        running: Sequence[Proposal],
        taken: Collection[Candidate],
        seed: int,
    ) -> tuple[Params, dict[str, Any]]:
        if params is not None:
            self.study.enqueue_trial(params)
        self.study.sampler = make_sampler(self._name, seed)
        trial = self._open[number] = self.study.ask()
        params = self._space.suggest(trial)
        frozen = self.study.get_trials(deepcopy=False)[trial.number]
        return params, {k: v for k, v in frozen.system_attrs.items() if k.endswith(":generation")}

    def _new_study(self) -> Study:
        study = optuna.create_study(
            directions=list(self._objectives.values()), sampler=RandomSampler()
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(self._objectives))
        return study

    def _add(self, proposal: Proposal, result: TrialResult) -> None:
        values = self._values(result)
        broken = {} if values is None else violations(self._constraints, result)
        if result.status == TrialStatus.EARLY_STOPPED:  # not judged before it is trained
            rising = {str(c) for c in self._constraints if c.metric in RISING}
            broken |= dict.fromkeys(rising & broken.keys(), 0.0)
        if proposal.number in self._open:
            trial = self._open.pop(proposal.number)
            for key, value in broken.items():
                trial.set_constraint(key, value)
            state = TrialState.FAIL if values is None else TrialState.COMPLETE
            self.study.tell(trial, values, state=state)
            return
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.FAIL if values is None else TrialState.COMPLETE,
                values=values,
                params=proposal.params,
                distributions=self._space.distributions(proposal.params),
                constraints=None if values is None else broken,
                system_attrs=proposal.sampler_attrs,
            )
        )

    def _values(self, result: TrialResult) -> list[float] | None:
        if result.status == TrialStatus.FAILED:
            return None
        values = [result.metric(name) for name in self._objectives]
        return None if any(v is None for v in values) else [v for v in values if v is not None]


def make_sampler(name: str, seed: int) -> BaseSampler:
    """The Optuna sampler called `name` (tpe, nsga2, gp, random)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return SAMPLERS[name](seed)


def trial_seed(seed: int, number: int) -> int:
    """A 31-bit seed of its own for trial `number` of the search with `seed`."""
    return (seed * 1_000_003 + number * 7_919 + 1) % (2**31 - 1)


class _NSGAII(NSGAIISampler):
    """Counts seeds into the first generation; parents always come in the order of the trials."""

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Optuna gives an enqueued trial no generation of its own accord."""
        super().before_trial(study, trial)
        self.get_trial_generation(study, trial)

    def get_parent_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        """Optuna returns the order of selection at first and that of the trials from its cache."""
        return sorted(super().get_parent_population(study, generation), key=lambda t: t.number)


def _tpe(seed: int) -> BaseSampler:
    return TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=10)


def _gp(seed: int) -> BaseSampler:
    return GPSampler(seed=seed, independent_sampler=_tpe(seed), n_startup_trials=GP_STARTUP)


def _nsga2(seed: int) -> BaseSampler:
    return _NSGAII(seed=seed, population_size=POPULATION)


def _random(seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": _tpe,
    "nsga2": _nsga2,
    "gp": _gp,
    "random": _random,
}
