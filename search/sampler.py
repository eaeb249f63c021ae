"""Ask and tell around one Optuna study, kept in memory and rebuilt from the ledger.

What trial `n` is asked depends on the seed, on `n` and on what was told before, and on nothing
else: the sampler's random state is set anew for each trial, so a resumed search continues as the
undisturbed one would.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from .config import SearchConfig
from .records import Candidate, TrialResult, TrialStatus, violations
from .seeds import Seed
from .space import Params, Space

POPULATION = 20  # NSGA-II: small, since a search has tens to hundreds of trials
GP_STARTUP = 12


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
    """One Optuna study behind ask, tell and restore."""

    def __init__(self, space: Space, config: SearchConfig, seeds: Sequence[Seed]) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._objectives = config.objectives
        self._constraints = config.constraints
        self._name = config.search.sampler
        self._seed = config.search.seed
        self._seeds = list(seeds)
        self._open: dict[int, optuna.trial.Trial] = {}
        self._study = optuna.create_study(
            directions=list(config.objectives.values()),
            sampler=RandomSampler(seed=self._seed),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names(list(config.objectives))

    def ask(self, number: int) -> Proposal:
        """Proposes trial `number`: a seed while there are some, then what the sampler likes."""
        origin: str = self._name
        if self._seeds:
            seed = self._seeds.pop(0)
            origin = seed.origin
            self._study.enqueue_trial(seed.params)
        self._study.sampler = make_sampler(self._name, trial_seed(self._seed, number))
        trial = self._study.ask()
        params = self._space.suggest(trial)
        self._open[number] = trial
        frozen = self._study.get_trials(deepcopy=False)[trial.number]
        attrs = {k: v for k, v in frozen.system_attrs.items() if k.endswith(":generation")}
        return Proposal(number, origin, params, self._space.candidate(params), attrs)

    def tell(self, number: int, result: TrialResult) -> None:
        """Reports how trial `number` ended; a failure teaches the sampler to stay away."""
        trial = self._open.pop(number)
        values = self._values(result)
        if values is None:
            self._study.tell(trial, state=TrialState.FAIL)
            return
        for key, value in violations(self._constraints, result).items():
            trial.set_constraint(key, value)
        self._study.tell(trial, values)

    def restore(self, proposal: Proposal, result: TrialResult) -> None:
        """Adds a finished trial of an earlier session; call in the order of the trials."""
        self._seeds = [seed for seed in self._seeds if seed.params != proposal.params]
        values = self._values(result)
        trial = optuna.trial.create_trial(
            state=TrialState.FAIL if values is None else TrialState.COMPLETE,
            values=values,
            params=proposal.params,
            distributions=self._space.distributions(proposal.params),
            constraints=None if values is None else violations(self._constraints, result),
            system_attrs=proposal.sampler_attrs,
        )
        self._study.add_trial(trial)

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
