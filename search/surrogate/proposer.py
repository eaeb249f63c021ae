"""Proposes the candidate with the largest expected growth of the front's hypervolume."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from ..front import non_dominated
from ..metrics import METRICS, Constraint
from ..records import Candidate
from ..space import Params, Space
from .acquisition import expected_improvement, normal_samples
from .features import Encoder
from .gp import GaussianProcess, Hyperparameters
from .variation import Variation

Array = npt.NDArray[np.float64]
Measured = Mapping[str, float]  # metric -> value

FEWEST = 6  # observations before the models are of use
REFIT_GROWTH = 1.25  # hyperparameters are found anew whenever there is a quarter more data
MOST = 600  # observations that a model reads: the front and the latest
ROUNDS, RANDOM, CHILDREN, PARENTS = 3, 60, 140, 30


@dataclass(frozen=True)
class Observation:
    """A finished trial: its parameters, its candidate and the metrics that were measured."""

    params: Params
    candidate: Candidate
    metrics: Measured


class SurrogateProposer:
    """Models each metric by a Gaussian process and searches the models by evolution.

    Args:
        space: The search space.
        objectives: Metric -> direction.
        constraints: Bounds; a candidate counts by how likely it is to hold them.
        reference: Metric -> the worst value that counts, see `front.reference_point`.
    """

    def __init__(
        self,
        space: Space,
        objectives: Mapping[str, str],
        constraints: Sequence[Constraint],
        reference: Mapping[str, float],
    ) -> None:
        self._space = space
        self._objectives = dict(objectives)
        self._constraints = list(constraints)
        self._reference = dict(reference)
        self._encoder = Encoder(space)
        self._fitted: dict[str, tuple[int, Hyperparameters]] = {}

    def propose(
        self,
        observations: Sequence[Observation],
        running: Sequence[tuple[Params, Candidate]],
        taken: Collection[Candidate],
        seed: int,
    ) -> Params:
        """Parameters of the next candidate; random ones while there is too little to learn from.

        Args:
            observations: All finished trials that have metrics, in the order of their numbers.
            running: Proposed and not yet finished: the models expect of them what they predict.
            taken: Candidates not to propose again.
            seed: Of everything drawn.
        """
        rng = np.random.default_rng(seed)
        variation = Variation(self._space, rng)
        if len(observations) < FEWEST:
            return self._unseen(variation.random, taken)
        models = {name: self._model(name, observations) for name in self._metrics}
        return self._search(models, observations, running, taken, variation, rng)

    @property
    def _metrics(self) -> list[str]:
        return list(dict.fromkeys([*self._objectives, *(c.metric for c in self._constraints)]))

    def _unseen(self, draw: Callable[[], Params], taken: Collection[Candidate]) -> Params:
        for _ in range(100):
            params = draw()
            if self._space.candidate(params) not in taken:
                break
        return params

    # --- the models -------------------------------------------------------------------------

    def _model(self, metric: str, observations: Sequence[Observation]) -> _Model:
        known = [o for o in observations if metric in o.metrics]
        scale = _SCALES.get(metric, _LOG)
        hyperparameters = self._hyperparameters(metric, known, scale)
        return self._fit(known[-MOST:], metric, scale, hyperparameters)

    def _fit(
        self,
        known: Sequence[Observation],
        metric: str,
        scale: _Scale,
        hyperparameters: Hyperparameters | None,
    ) -> _Model:
        features = self._encoder.encode([o.candidate for o in known])
        targets = np.array([scale.forward(o.metrics[metric]) for o in known])
        gp = GaussianProcess(features, targets, self._encoder.kinds, hyperparameters)
        return _Model(gp, scale)

    def _hyperparameters(
        self, metric: str, known: Sequence[Observation], scale: _Scale
    ) -> Hyperparameters:
        """Fitted on the first so-many observations, so that a resumed search finds the same."""
        milestone = _milestone(len(known))
        if self._fitted.get(metric, (0, None))[0] != milestone:
            gp = self._fit(known[:milestone][-MOST:], metric, scale, None).gp
            self._fitted[metric] = milestone, gp.fit_hyperparameters()
        return self._fitted[metric][1]

    # --- the search -------------------------------------------------------------------------

    def _search(
        self,
        models: Mapping[str, _Model],
        observations: Sequence[Observation],
        running: Sequence[tuple[Params, Candidate]],
        taken: Collection[Candidate],
        variation: Variation,
        rng: np.random.Generator,
    ) -> Params:
        costs, parents = self._front(observations)
        if running:
            expected = self._costs(models, self._encoder.encode([c for _, c in running]), None)
            costs = np.concatenate([costs, expected[0]])
        reference = self._reference_costs()
        normals = normal_samples(len(self._metrics), int(rng.integers(2**31)))
        pool: dict[Candidate, tuple[float, Params]] = {}
        for turn in range(ROUNDS):
            drawn = [variation.random() for _ in range(RANDOM if turn == 0 else 0)]
            drawn += [self._child(parents, variation, rng) for _ in range(CHILDREN)]
            new = {self._space.candidate(p): p for p in drawn}
            fresh = [c for c in new if c not in pool and c not in taken]
            if fresh:
                gains = self._gains(models, fresh, costs, reference, normals)
                pool |= {c: (g, new[c]) for c, g in zip(fresh, gains, strict=True)}
            best = sorted(pool.values(), key=lambda item: -item[0])[:PARENTS]
            parents = [params for _, params in best] or parents
        if not pool:
            return self._unseen(variation.random, taken)
        return max(pool.values(), key=lambda item: item[0])[1]

    def _child(
        self, parents: Sequence[Params], variation: Variation, rng: np.random.Generator
    ) -> Params:
        one = parents[int(rng.integers(len(parents)))]
        if rng.random() < 0.5:
            return variation.mutate(one)
        child = variation.cross(one, parents[int(rng.integers(len(parents)))])
        return variation.mutate(child) if rng.random() < 0.5 else child

    def _gains(
        self,
        models: Mapping[str, _Model],
        candidates: Sequence[Candidate],
        front: Array,
        reference: Array,
        normals: Array,
    ) -> list[float]:
        features = self._encoder.encode(candidates)
        samples = self._costs(models, features, normals)
        gains = expected_improvement(samples, front, reference)
        for constraint in self._constraints:
            gains = gains * models[constraint.metric].probability(constraint, features)
        return [float(gain) for gain in gains]

    def _costs(
        self, models: Mapping[str, _Model], features: Array, normals: Array | None
    ) -> Array:
        """Objectives as costs, [samples, candidates, objectives]; the medians without normals."""
        columns = []
        for index, (metric, direction) in enumerate(self._objectives.items()):
            drawn = models[metric].samples(
                features, None if normals is None else normals[:, index]
            )
            columns.append(-drawn if direction == "maximize" else drawn)
        return np.stack(columns, axis=2) / self._units()

    def _front(self, observations: Sequence[Observation]) -> tuple[Array, list[Params]]:
        """Costs and parameters of the feasible front; all trials are parents where it is short."""
        known = [o for o in observations if all(m in o.metrics for m in self._objectives)]
        feasible = [
            o for o in known
            if all(c.violation(o.metrics.get(c.metric, math.inf)) <= 0 for c in self._constraints)
        ]  # fmt: skip
        costs = self._observed(feasible)
        mask = non_dominated(costs, [False] * len(self._objectives))
        parents = [o.params for o, member in zip(feasible, mask, strict=True) if member]
        if len(parents) < 2:
            parents += [o.params for o in known]
        return costs[mask], parents

    def _observed(self, observations: Sequence[Observation]) -> Array:
        rows = [
            [
                -o.metrics[m] if d == "maximize" else o.metrics[m]
                for m, d in self._objectives.items()
            ]
            for o in observations
        ]
        return np.array(rows).reshape(len(rows), len(self._objectives)) / self._units()

    def _reference_costs(self) -> Array:
        signs = [-1.0 if d == "maximize" else 1.0 for d in self._objectives.values()]
        worst = np.array([self._reference[m] for m in self._objectives])
        return np.asarray(worst * signs / self._units())

    def _units(self) -> Array:
        """Of a hypervolume that no unit of measurement inflates."""
        return np.array([abs(self._reference[m]) or 1.0 for m in self._objectives])


# --- one metric ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    """A monotone map to numbers that add up better, and its inverse."""

    forward: Callable[[float], float]
    inverse: Callable[[Array], Array]


_EDGE = 0.01
_LOGIT = _Scale(
    lambda p: math.log((p + _EDGE) / (1 + _EDGE - p)),
    lambda z: (1 + 2 * _EDGE) / (1 + np.exp(-z)) - _EDGE,
)
_LOG = _Scale(lambda v: math.log(max(v, 1e-12)), lambda z: np.exp(z))
_PLAIN = _Scale(lambda v: v, lambda z: z)
_SCALES = {"accuracy": _LOGIT, "accuracy_drop": _PLAIN}
assert _SCALES.keys() <= METRICS.keys()


@dataclass(frozen=True)
class _Model:
    gp: GaussianProcess
    scale: _Scale

    def samples(self, features: Array, normals: Array | None) -> Array:
        """[samples, candidates]; one row of medians without normals."""
        mean, deviation = self.gp.predict(features)
        z = np.zeros(1) if normals is None else normals
        return self.scale.inverse(mean + z[:, None] * deviation)

    def probability(self, constraint: Constraint, features: Array) -> Array:
        """How likely each candidate holds the bound, [candidates]."""
        mean, deviation = self.gp.predict(features)
        below = norm.cdf((self.scale.forward(constraint.bound) - mean) / deviation)
        return np.asarray(below if constraint.op[0] == "<" else 1 - below)


def _milestone(count: int) -> int:
    """The largest number of a geometric series that is at most `count`."""
    steps = math.floor(math.log(count / FEWEST) / math.log(REFIT_GROWTH) + 1e-9)
    return max(FEWEST, min(count, math.ceil(FEWEST * REFIT_GROWTH**steps - 1e-9)))
