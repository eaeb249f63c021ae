"""The Pareto front: who is on it, how much it dominates, and which member to take."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..methods.names import nearest
from .config_errors import RuleError
from .metrics import Constraint, dense_value, metrics_of, split
from .records import TrialResult, TrialStatus, probes_of
from .yaml_source import ConfigError

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def non_dominated(points: npt.ArrayLike, maximize: Sequence[bool]) -> Mask:
    """Which points no other point dominates.

    Args:
        points: [num_points, num_objectives]. A row with a NaN is never on the front.
        maximize: For each objective whether more is better.

    Returns:
        Mask, [num_points]. Of equal points only the first is on the front.
    """
    costs = _costs(points, maximize)
    mask: Mask = np.zeros(len(costs), dtype=bool)
    left = np.flatnonzero(~np.isnan(costs).any(axis=1))
    left = left[np.lexsort(costs[left].T[::-1])]  # stable: of equal points the first comes first
    while len(left):  # nothing that is left dominates the first
        mask[left[0]] = True
        left = left[(costs[left] < costs[left[0]]).any(axis=1)]
    return mask


def hypervolume(
    points: npt.ArrayLike, reference_point: Sequence[float], maximize: Sequence[bool]
) -> float:
    """Volume that `points` dominate, bounded by the reference point; exact.

    WFG (While et al. 2012, doi:10.1109/TEVC.2010.2077298): each point's own box less what the
    later points dominate of it, down to a sweep in two dimensions.

    Args:
        points: [num_points, num_objectives]. Points that are not better than the reference
            point in every objective add nothing.
        reference_point: [num_objectives].
        maximize: For each objective whether more is better.
    """
    costs, reference = _costs(points, maximize), _costs([reference_point], maximize)[0]
    return _volume(costs[(costs < reference).all(axis=1)], reference)


def front_of(results: Sequence[TrialResult], objectives: Mapping[str, str]) -> list[TrialResult]:
    """The non-dominated completed trials, the best in the second objective first.

    Args:
        results: Trials in any state; a trial that lacks an objective's metric is left out.
        objectives: Metric -> `maximize` or `minimize`.
    """
    candidates = _measured(results, objectives)
    if not candidates:
        return []
    maximize = _maximize(objectives)
    points = points_of(candidates, objectives)
    mask = non_dominated(points, maximize)
    key = _costs(points, maximize)[:, min(1, len(objectives) - 1)]
    order = sorted(np.flatnonzero(mask), key=lambda index: (key[index], index))
    return [candidates[index] for index in order]


class Front:
    """The front of trials that arrive one by one; a trial costs one pass over its members.

    It is what `front_of` says of the same trials in the order of their names, whatever order they
    came in.
    """

    def __init__(self, objectives: Mapping[str, str], reference: Sequence[float]) -> None:
        """An empty front.

        Args:
            objectives: Metric -> `maximize` or `minimize`.
            reference: The `reference_point` of the hypervolume.
        """
        self._objectives = objectives
        self._maximize = _maximize(objectives)
        self._reference = _costs([reference], self._maximize)[0]
        self._key = min(1, len(objectives) - 1)
        self._members: list[tuple[tuple[float, ...], TrialResult]] = []
        self._costs = np.empty((0, len(self._maximize)))
        self.hypervolume = 0.0

    @property
    def members(self) -> list[TrialResult]:
        """The members, the best in the second objective first."""
        return [result for _, result in self._members]

    def add(self, result: TrialResult) -> bool:
        """Takes a trial in any state; True if the front is another one now."""
        if not _measured([result], self._objectives):
            return False
        cost = tuple(_costs(points_of([result], self._objectives), self._maximize)[0].tolist())
        if self._covers(cost, result.trial_id):
            return False
        self.hypervolume += self._gain(cost)
        self._members = [(c, r) for c, r in self._members if not _covers(cost, c)]
        bisect.insort(self._members, (cost, result), key=self._order)
        self._costs = np.array([c for c, _ in self._members])
        return True

    def _covers(self, cost: tuple[float, ...], name: str) -> bool:
        """Whether a member is no worse in any objective; of equal ones the first name counts."""
        no_worse = np.flatnonzero((self._costs <= np.asarray(cost)).all(axis=1))
        members = (self._members[index] for index in no_worse)
        return any(c != cost or member.trial_id < name for c, member in members)

    def _gain(self, cost: tuple[float, ...]) -> float:
        """Volume that only `cost` dominates: its own box less what the members have of it."""
        point = np.asarray(cost)
        if not (point < self._reference).all():
            return 0.0
        others = np.maximum(self._costs, point)
        shared = others[(others < self._reference).all(axis=1)]
        return float((self._reference - point).prod()) - _volume(shared, self._reference)

    def _order(self, member: tuple[tuple[float, ...], TrialResult]) -> tuple[float, str]:
        return member[0][self._key], member[1].trial_id


def points_of(results: Sequence[TrialResult], objectives: Mapping[str, str]) -> Array:
    """The objectives' values, [num_results, num_objectives]; NaN where one was not measured."""
    rows = [[_value(result, metric) for metric in objectives] for result in results]
    return np.array(rows, dtype=np.float64).reshape(len(results), len(objectives))


def front_hypervolume(
    results: Sequence[TrialResult],
    baseline: Mapping[str, Any],
    objectives: Mapping[str, str],
) -> float:
    """Hypervolume of the completed trials, bounded by `reference_point`."""
    points = points_of(_measured(results, objectives), objectives)
    return hypervolume(points, reference_point(baseline, objectives), _maximize(objectives))


def reference_point(
    baseline: Mapping[str, Any], objectives: Mapping[str, str]
) -> tuple[float, ...]:
    """The fixed corner from which hypervolume is measured, a little worse than dense.

    Accuracy 0; accuracy_drop the whole dense accuracy; loss that of a uniform guess among ten
    classes, or 1.1 x dense if that is more; speedup 1 / 1.1; every other metric 1.1 x dense.

    Args:
        baseline: The dense model's metrics.
        objectives: Metric -> direction.

    Raises:
        KeyError: If the baseline lacks a metric that is needed.
    """
    return tuple(_worst(metric, baseline) for metric in objectives)


def choose(
    results: Sequence[TrialResult],
    minimize: str | None = None,
    maximize: str | None = None,
    where: Sequence[str] = (),
    knee: Mapping[str, str] | None = None,
) -> TrialResult:
    """The best completed trial among those that satisfy `where`.

    Args:
        results: The trials to choose from. Of equal ones the more accurate is taken.
        minimize: Metric of which less is wanted.
        maximize: Metric of which more is wanted.
        where: Bounds such as `accuracy_drop <= 0.01`.
        knee: Objectives of which the best compromise is wanted (`knee_sums`); exactly one of
            minimize, maximize and knee is given.

    Raises:
        ConfigError: If a metric or a bound is malformed, or nothing satisfies the bounds; the
            message then says how close the closest trial came.
    """
    if sum(wish is not None for wish in (minimize, maximize, knee)) != 1:
        raise ConfigError(
            f"`metric` (={minimize}, {maximize}) must be one: exactly one of minimize, maximize"
            " and knee is needed. Write for example --min latency_ms."
        )
    metrics = [metric for metric in (minimize, maximize, *(knee or ())) if metric is not None]
    bounds = [_bound(text) for text in where]
    probes = probes_of(results)
    for name in (*metrics, *(bound.metric for bound in bounds)):
        if results or not split(name)[1]:  # without results no probe is known
            _check_metric(name, probes)
    measured = _measured(results, [*metrics, *(bound.metric for bound in bounds)])
    if not measured:
        raise ConfigError(
            f"`{', '.join(metrics)}` must have been measured by a completed trial: none of"
            f" {len(results)} was. Choose another metric or run more trials."
        )
    satisfying = [
        index
        for index, r in enumerate(measured)
        if all(b.violation(_value(r, b.metric)) <= 0 for b in bounds)
    ]
    if not satisfying:
        raise ConfigError(_closest(measured, bounds))
    costs = _wanted(measured, metrics, "maximize" if maximize is not None else "minimize", knee)

    def rank(index: int) -> tuple[float, float, str]:
        result = measured[index]
        return float(costs[index]), -(result.accuracy or 0.0), result.trial_id

    return measured[min(satisfying, key=rank)]


def knee_sums(points: npt.ArrayLike, maximize: Sequence[bool]) -> Array:
    """How far each point is from a front's knee; the least is the knee.

    Objectives are scaled to 0 (the front's best) to 1 (its worst) and summed: the least sum is
    the point that bulges furthest from the plane through the extremes, as in Das 1999,
    doi:10.1007/BF01195985.

    Args:
        points: [num_points, num_objectives], without NaN.
        maximize: For each objective whether more is better.

    Returns:
        [num_points], each in 0..num_objectives.
    """
    costs = _costs(points, maximize)
    low, high = costs.min(axis=0), costs.max(axis=0)
    sums: Array = ((costs - low) / np.where(high > low, high - low, 1.0)).sum(axis=1)
    return sums


def _wanted(
    measured: Sequence[TrialResult],
    metrics: Sequence[str],
    direction: str,
    knee: Mapping[str, str] | None,
) -> Array:
    """What is least for the trial that is wanted, [num_measured]."""
    if knee is not None:
        return knee_sums(points_of(measured, knee), _maximize(knee))
    wanted = {metrics[0]: direction}
    return _costs(points_of(measured, wanted), _maximize(wanted))[:, 0]


def _closest(measured: Sequence[TrialResult], bounds: Sequence[Constraint]) -> str:
    """Message that names the trial with the smallest relative violation."""

    def beyond(result: TrialResult) -> float:
        scaled = [b.violation(_value(result, b.metric)) / (abs(b.bound) or 1.0) for b in bounds]
        return sum(max(0.0, violation) for violation in scaled)

    best = min(measured, key=beyond)
    reached = ", ".join(f"{b.metric} = {_value(best, b.metric):.6g}" for b in bounds)
    wanted = " and ".join(str(bound) for bound in bounds)
    return (
        f"`where` (={wanted}) must hold for a completed trial: none of {len(measured)} satisfies"
        f" it. The closest is trial {best.trial_id} with {reached}. Loosen the bound or run more"
        " trials."
    )


def _bound(text: str) -> Constraint:
    try:
        return Constraint.parse(text)
    except RuleError as error:
        raise ConfigError(f"`where` (={text}) must {error}. {error.fix}") from None


def _check_metric(metric: str, probes: Sequence[str]) -> None:
    known = metrics_of(probes)
    if metric not in known:
        hint = nearest(metric, known) or "Choose one of these."
        raise ConfigError(f"`metric` (={metric}) must be one of {', '.join(known)}. {hint}")


def _worst(metric: str, baseline: Mapping[str, Any]) -> float:
    match split(metric)[0]:
        case "accuracy":
            return 0.0
        case "accuracy_drop":
            return float(baseline["accuracy"])
        case "speedup":
            return 1 / 1.1
        case "loss":
            return max(1.1 * float(baseline["loss"]), math.log(10))
    value = dense_value(baseline, metric)
    if value is None:
        raise KeyError(metric)
    return 1.1 * value


def _volume(costs: Array, reference: Array) -> float:
    """Hypervolume of costs (less is better) that are all below the reference point."""
    if len(costs) == 0:
        return 0.0
    if len(reference) == 1:
        return float(reference[0] - costs[:, 0].min())
    if len(reference) > 2:
        costs = costs[non_dominated(costs, [False] * len(reference))]
    costs = costs[np.lexsort(costs.T[::-1])]
    if len(reference) == 2:
        lowest = np.minimum.accumulate(costs[:, 1])
        costs = costs[np.append(True, costs[1:, 1] < lowest[:-1])]  # the non-dominated ones
        ceilings = np.concatenate([reference[1:], costs[:-1, 1]])
        return float(((reference[0] - costs[:, 0]) * (ceilings - costs[:, 1])).sum())
    return sum(
        float((reference - cost).prod()) - _volume(np.maximum(costs[index + 1 :], cost), reference)
        for index, cost in enumerate(costs)
    )


def _covers(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether no cost of `one` is above that of `other`."""
    return all(a <= b for a, b in zip(one, other, strict=True))


def _costs(points: npt.ArrayLike, maximize: Sequence[bool]) -> Array:
    """Points with the sign turned so that less is better."""
    array = np.asarray(points, dtype=np.float64).reshape(-1, len(maximize))
    return np.where(np.asarray(maximize, dtype=bool), -array, array)


def _maximize(objectives: Mapping[str, str]) -> list[bool]:
    return [direction == "maximize" for direction in objectives.values()]


def _measured(
    results: Sequence[TrialResult], metrics: Mapping[str, str] | Sequence[str]
) -> list[TrialResult]:
    return [
        result
        for result in results
        if result.status is TrialStatus.COMPLETED
        and not any(math.isnan(_value(result, metric)) for metric in metrics)
    ]


def _value(result: TrialResult, metric: str) -> float:
    value = result.metric(metric)
    return math.nan if value is None else value
