"""Proposes the candidate with the largest expected growth of the front's hypervolume."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from ..front import non_dominated
from ..metrics import Constraint
from ..records import Candidate
from ..space import Params, Space
from .acquisition import expected_improvement, normal_samples
from .features import Encoder, Hints, Point
from .gp import GaussianProcess, Hyperparameters
from .variation import Variation

Array = npt.NDArray[np.float64]
Measured = Mapping[str, float]  # metric -> value

FEWEST = 6  # observations before the models are of use
REFIT_GROWTH = 1.25  # hyperparameters are found anew whenever there is a quarter more data
MOST = 600  # latest observations that a model reads, beside the front
MOST_FITTED = 300  # observations that hyperparameters are found from, at most
RIDGE = 2.0  # observations that the slope's prior counts as
ROUNDS, RANDOM, CHILDREN, PARENTS = 3, 60, 140, 30


@dataclass(frozen=True)
class Observation:
    """A trial that has ended, or waits: its parameters, its candidate and what was measured.

    A trial that stopped before its whole budget lacks the metrics that training changes; `early`
    is its accuracy before any training, which every trial has.
    """

    params: Params
    candidate: Candidate
    metrics: Measured
    early: float | None = None

    @property
    def point(self) -> Point:
        """What the encoder reads."""
        return self.params, self.candidate


class SurrogateProposer:
    """Models each metric by a Gaussian process and searches the models by evolution.

    Args:
        space: The search space.
        objectives: Metric -> direction.
        constraints: Bounds; a candidate counts by how likely it is to hold them.
        reference: Metric -> the worst value that counts, see `front.reference_point`.
        hints: What is known of a candidate without a trial.
    """

    def __init__(
        self,
        space: Space,
        objectives: Mapping[str, str],
        constraints: Sequence[Constraint],
        reference: Mapping[str, float],
        hints: Hints | None = None,
    ) -> None:
        self._space = space
        self._objectives = dict(objectives)
        self._constraints = list(constraints)
        self._reference = dict(reference)
        self._encoder = Encoder(space, hints)
        self._fitted: dict[str, tuple[str, Hyperparameters]] = {}

    def propose(
        self,
        observations: Sequence[Observation],
        running: Sequence[Point],
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
        if any(sum(m in o.metrics for o in observations) < FEWEST for m in self._metrics):
            return self._unseen(variation.random, taken)
        models = self._models(self._latest(observations), observations[:MOST])
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

    def _latest(self, observations: Sequence[Observation]) -> Sequence[Observation]:
        """What the models read: the latest trials, and the front whenever it was found."""
        if len(observations) <= MOST:
            return observations
        front = {id(params) for params in self._front(observations)[1]}
        early = [o for o in observations[:-MOST] if id(o.params) in front]
        return [*early, *observations[-MOST:]]

    def _models(
        self, latest: Sequence[Observation], first: Sequence[Observation] | None = None
    ) -> _Models:
        """One model a metric; that of the accuracy reads the accuracy before training.

        So trials that stopped early teach too (recursive co-kriging: Le Gratiet and Garnier 2014,
        arXiv:1210.0686): the accuracy before training, which all trials have, is modelled first,
        and what training changes is modelled as the deviation from its trend.

        Args:
            latest: What the models read.
            first: What their hyperparameters are found from, which hardly changes: a resumed
                search finds the same, and a long one does not find them anew with each trial.
                By default the latest.
        """
        first = latest if first is None else first
        trained = [metric for metric in self._metrics if metric in _SIGNS]
        stopped = any(m not in o.metrics for m in trained for o in (*latest, *first))
        tried = min(sum(o.early is not None for o in part) for part in (latest, first))
        names = [_EARLY] if stopped and tried >= FEWEST else []
        now = self._data(latest, [*names, *self._metrics])
        then = now if first == latest else self._data(first, [*names, *self._metrics])
        if any(len(data.targets) < FEWEST for data in then.values()):
            then = now  # most of the first have failed
        models = {name: self._model(name, now[name], then[name]) for name in now}
        return _Models(self._encoder, models.pop(_EARLY, None), models)

    def _data(self, observations: Sequence[Observation], names: Sequence[str]) -> dict[str, _Data]:
        """What each model reads of some trials."""
        features = self._encoder.encode([o.point for o in observations])
        expected = {
            n: _LOGIT.forward(o.early) for n, o in enumerate(observations) if o.early is not None
        }
        found = {}
        for name in names:
            if name == _EARLY:
                rows = list(expected)
                found[name] = _Data(features[rows], np.array([expected[n] for n in rows]), None)
                continue
            read = _EARLY in names and name in _SIGNS
            rows = [n for n, o in enumerate(observations) if name in o.metrics]
            rows = [n for n in rows if not read or n in expected]
            scale = _SCALES.get(name, _LOG)
            targets = np.array([scale.forward(observations[n].metrics[name]) for n in rows])
            known = np.array([expected[n] for n in rows]) if read else None
            found[name] = _Data(features[rows], targets, known)
        return found

    def _model(self, metric: str, now: _Data, then: _Data) -> _Model:
        basis = then.first(_milestone(min(len(then.targets), MOST_FITTED)))
        kinds = self._encoder.kinds(basis.features.shape[1])
        if basis.early is not None:
            kinds = [*kinds, slice(basis.features.shape[1], basis.features.shape[1] + 1)]
        inputs, rest = basis.inputs, basis.residuals(basis.trend(metric))
        key = hashlib.sha256(inputs.tobytes() + rest.tobytes()).hexdigest()
        if self._fitted.get(metric, ("", None))[0] != key:
            self._fitted[metric] = key, GaussianProcess(inputs, rest, kinds).fit_hyperparameters()
        trend = now.trend(metric)
        gp = GaussianProcess(now.inputs, now.residuals(trend), kinds, self._fitted[metric][1])
        return _Model(gp, _SCALES.get(metric, _LOG), trend, now.early is not None)

    # --- the search -------------------------------------------------------------------------

    def _search(
        self,
        models: _Models,
        observations: Sequence[Observation],
        running: Sequence[Point],
        taken: Collection[Candidate],
        variation: Variation,
        rng: np.random.Generator,
    ) -> Params:
        costs, parents = self._front(observations)
        if running:
            expected = self._costs(models, models.features(running), None)
            costs = np.concatenate([costs, expected[0]])
        reference = self._reference_costs()
        normals = normal_samples(len(self._metrics), int(rng.integers(2**31)))
        pool: dict[Candidate, tuple[float, Params]] = {}
        for turn in range(ROUNDS):
            drawn = [variation.random() for _ in range(RANDOM if turn == 0 else 0)]
            drawn += [self._child(parents, variation, rng) for _ in range(CHILDREN)]
            new = {self._space.candidate(p): p for p in drawn}
            fresh = [(p, c) for c, p in new.items() if c not in pool and c not in taken]
            if fresh:
                gains = self._gains(models, fresh, costs, reference, normals)
                pool |= {c: (g, p) for (p, c), g in zip(fresh, gains, strict=True)}
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
        models: _Models,
        points: Sequence[Point],
        front: Array,
        reference: Array,
        normals: Array,
    ) -> list[float]:
        features = models.features(points)
        samples = self._costs(models, features, normals)
        gains = expected_improvement(samples, front, reference)
        for constraint in self._constraints:
            gains = gains * models.by_metric[constraint.metric].probability(constraint, features)
        return [float(gain) for gain in gains]

    def _costs(self, models: _Models, features: _Features, normals: Array | None) -> Array:
        """Objectives as costs, [samples, candidates, objectives]; the medians without normals."""
        columns = []
        for index, (metric, direction) in enumerate(self._objectives.items()):
            drawn = models.by_metric[metric].samples(
                features, None if normals is None else normals[:, index]
            )
            columns.append(-drawn if direction == "maximize" else drawn)
        return np.stack(columns, axis=2) / self._units()

    def _front(self, observations: Sequence[Observation]) -> tuple[Array, list[Params]]:
        """Costs and parameters of the feasible front; all trials are parents where it is short."""
        known = [o for o in observations if all(m in o.metrics for m in self._objectives)]
        feasible = [
            o for o in known
            if all(
                c.metric in o.metrics and c.violation(o.metrics[c.metric]) <= 0
                for c in self._constraints
            )
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


def _logit(p: float) -> float:
    p = min(max(p, 0.0), 1.0)
    return math.log((p + _EDGE) / (1 + _EDGE - p))


_LOGIT = _Scale(_logit, lambda z: (1 + 2 * _EDGE) / (1 + np.exp(-z)) - _EDGE)
_LOG = _Scale(lambda v: math.log(max(v, 1e-12)), lambda z: np.exp(z))
_PLAIN = _Scale(lambda v: v, lambda z: z)
_EARLY = "accuracy_before_finetune"
_SCALES = {"accuracy": _LOGIT, _EARLY: _LOGIT, "accuracy_drop": _PLAIN}
_SIGNS = {"accuracy": 1.0, "accuracy_drop": -1.0, "loss": -1.0}
"""What training changes, and whether it grows with the accuracy before training."""


def _unit(logits: Array) -> Array:
    """Log-odds of an accuracy as a feature of about 0..1."""
    return logits / (2 * _logit(1.0)) + 0.5


@dataclass(frozen=True)
class _Features:
    """What the models read of candidates; `early` is the expected log-odds, and its deviation."""

    encoded: Array
    early: tuple[Array, Array] | None = None


@dataclass(frozen=True)
class _Models:
    encoder: Encoder
    early: _Model | None
    by_metric: Mapping[str, _Model]

    def features(self, points: Sequence[Point]) -> _Features:
        """Of candidates that were not tried."""
        features = _Features(self.encoder.encode(points))
        if self.early is None:
            return features
        return _Features(features.encoded, self.early.distribution(features))


@dataclass(frozen=True)
class _Trend:
    """A metric that follows the log-odds of the early accuracy, in a line; none by default."""

    offset: float = 0.0
    slope: float = 0.0

    @classmethod
    def of(cls, early: Array, targets: Array, sign: float) -> _Trend:
        """Least squares; little data pulls the slope to `sign`, in standard deviations."""
        x, y = early - early.mean(), targets - targets.mean()
        spread = float(x.std()) or 1.0
        pull = RIDGE * spread**2
        slope = (float(x @ y) + sign * pull * float(y.std()) / spread) / (float(x @ x) + pull)
        return cls(float(targets.mean() - slope * early.mean()), slope)

    def __call__(self, early: Array) -> Array:
        return self.offset + self.slope * early


@dataclass(frozen=True)
class _Data:
    """What a model reads: features [n, d], targets [n], and the early log-odds if it does."""

    features: Array
    targets: Array
    early: Array | None

    def first(self, count: int) -> _Data:
        """Of the first trials only."""
        early = None if self.early is None else self.early[:count]
        return _Data(self.features[:count], self.targets[:count], early)

    @property
    def inputs(self) -> Array:
        """The features, and the early accuracy as one more."""
        if self.early is None:
            return self.features
        return np.column_stack([self.features, _unit(self.early)])

    def trend(self, metric: str) -> _Trend:
        """How the targets follow the early log-odds."""
        if self.early is None:
            return _Trend()
        return _Trend.of(self.early, self.targets, _SIGNS[metric])

    def residuals(self, trend: _Trend) -> Array:
        """What the trend leaves, [n]."""
        return self.targets if self.early is None else self.targets - trend(self.early)


@dataclass(frozen=True)
class _Model:
    gp: GaussianProcess
    scale: _Scale
    trend: _Trend
    reads_early: bool

    def distribution(self, features: _Features) -> tuple[Array, Array]:
        """Mean and standard deviation on the metric's scale, [candidates] each."""
        if not self.reads_early or features.early is None:
            return self.gp.predict(features.encoded)
        early, doubt = features.early
        mean, deviation = self.gp.predict(np.column_stack([features.encoded, _unit(early)]))
        return mean + self.trend(early), np.hypot(deviation, self.trend.slope * doubt)

    def samples(self, features: _Features, normals: Array | None) -> Array:
        """[samples, candidates]; one row of medians without normals."""
        mean, deviation = self.distribution(features)
        z = np.zeros(1) if normals is None else normals
        return self.scale.inverse(mean + z[:, None] * deviation)

    def probability(self, constraint: Constraint, features: _Features) -> Array:
        """How likely each candidate holds the bound, [candidates]."""
        mean, deviation = self.distribution(features)
        below = norm.cdf((self.scale.forward(constraint.bound) - mean) / deviation)
        return np.asarray(below if constraint.op[0] == "<" else 1 - below)


def _milestone(count: int) -> int:
    """The largest number of a geometric series that is at most `count`."""
    steps = math.floor(math.log(count / FEWEST) / math.log(REFIT_GROWTH) + 1e-9)
    return max(FEWEST, min(count, math.ceil(FEWEST * REFIT_GROWTH**steps - 1e-9)))
