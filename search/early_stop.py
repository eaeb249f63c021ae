"""Which trials go on to a higher fidelity: asynchronous successive halving towards a front.

Promotion-type ASHA (Li et al. 2020, arXiv:1810.05934) with non-dominated rank and the epsilon-net
order for ties (Schmucker et al. 2021, arXiv:2106.12639). All of it follows from the ledger's rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from .config import SearchConfig
from .records import FULL_FIDELITY, TrialResult, TrialStatus, is_uniform

RISING = ("accuracy", "accuracy_drop", "loss")  # metrics that get better with the fidelity
TRAINING = 3  # a training step costs so many forward passes
PAYS = 8  # fine-tuning must cost so many times an evaluation, or few trials are worth stopping
POOR, ENOUGH = 0.5, 8  # a rank correlation below this over at least so many trials is a warning

Array = npt.NDArray[np.float64]


def fidelities(config: SearchConfig) -> tuple[int, ...]:
    """The rungs of a run, each a fidelity; the last is the full one.

    Without fine-tuning there is one: nothing distinguishes the others.
    """
    if config.search.early_stop and config.recover.epochs > 0:
        return (0, 1, FULL_FIDELITY)
    return (FULL_FIDELITY,)


def settled(config: SearchConfig, num_train: int, num_val: int) -> SearchConfig:
    """The config with `search.early_stop: auto` decided.

    Args:
        config: The config.
        num_train: Training images.
        num_val: Validation images.
    """
    if config.search.early_stop != "auto":
        return config
    recover = config.recover
    evaluation = num_val + min(recover.recalibration_images, num_train) * recover.recalibrate_bn
    pays = TRAINING * recover.epochs * num_train >= PAYS * evaluation
    search = config.search.model_copy(update={"early_stop": pays})
    return config.model_copy(update={"search": search})


def trained_share(config: SearchConfig) -> float:
    """The share of the fine-tuning that a trial gets on average, about."""
    if len(fidelities(config)) == 1:
        return 1.0
    going_on = 1 / config.search.reduction_factor
    return config.search.short_share * going_on + (1 - config.search.short_share) * going_on**2


class Ladder:
    """Who stands on which rung, and who is to climb.

    A trial is promotable when it has not been promoted from its rung yet and is among the best
    1 / `reduction_factor` of the rung, or on the rung's own front: a front needs many members.
    So is the best of uniform pruning, the front of its own trials: a control that is trained less
    than the others controls nothing.

    Args:
        objectives: Metric -> `maximize` or `minimize`. Accuracy, its drop and the loss are all
            judged by the accuracy at the rung; the others are the same at every rung.
        rungs: Fidelities, in order; from the last there is nothing to be promoted to.
        reduction_factor: Of so many trials at a rung about one goes on.
    """

    def __init__(
        self, objectives: Mapping[str, str], rungs: tuple[int, ...], reduction_factor: int
    ) -> None:
        self._objectives = objectives
        self._next = dict(zip(rungs, rungs[1:], strict=False))
        self._rungs = {rung: _Rung(reduction_factor, len(objectives)) for rung in self._next}

    def report(self, result: TrialResult) -> None:
        """Puts a trial on the rungs that it has reached, as its row tells."""
        for rung in set(rungs_reached(result)) & self._rungs.keys():
            costs = _costs(self._objectives, rung, result)
            if costs is not None:  # else it can never be on the front
                waits = result.status is TrialStatus.EARLY_STOPPED and rung == result.fidelity
                self._rungs[rung].add(result.trial_id, costs, promoted=not waits)
                if is_uniform(result):
                    self._rungs[rung].controls.add(result.trial_id)

    def promote(self) -> tuple[str, int] | None:
        """The next trial to go on, and to which rung; the highest rung first. None: nobody.

        What it answers depends on the set of the reports and of the promotions so far, not on
        their order.
        """
        for rung, to in reversed(self._next.items()):
            trial_id = next(self._rungs[rung].promotable(), None)
            if trial_id is not None:
                self._rungs[rung].promoted.add(trial_id)
                return trial_id, to
        return None

    @property
    def num_promotable(self) -> int:
        """How many trials could be promoted now."""
        return sum(sum(1 for _ in rung.promotable()) for rung in self._rungs.values())


def ladder_of(config: SearchConfig, results: Iterable[TrialResult] = ()) -> Ladder:
    """The ladder of a run as its ledger tells it.

    Where no objective tells how good a trial is, its accuracy counts too: by costs alone only the
    smallest candidates, which are of no use, would ever go on.
    """
    objectives = dict(config.objectives)
    if not set(RISING) & set(objectives):
        objectives["accuracy"] = "maximize"
    ladder = Ladder(objectives, fidelities(config), config.search.reduction_factor)
    for result in results:
        ladder.report(result)
    return ladder


def rungs_reached(result: TrialResult) -> list[int]:
    """The fidelities at which a trial has waited to be promoted."""
    if result.status is TrialStatus.DUPLICATE:
        return []
    ended = result.status in (TrialStatus.COMPLETED, TrialStatus.INFEASIBLE)
    known = [f for f, accuracy in enumerate(result.accuracy_by_fidelity) if accuracy is not None]
    return [rung for rung in known if not (ended and rung == result.fidelity)]


# --- one rung --------------------------------------------------------------------------------


class _Rung:
    """The trials that have reached a rung, by non-dominated rank (0 is the front)."""

    def __init__(self, reduction_factor: int, num_objectives: int) -> None:
        self.promoted: set[str] = set()
        self.controls: set[str] = set()  # their own front is promotable too
        self._reduction_factor = reduction_factor
        self._names: list[str] = []
        self._known: set[str] = set()
        self._costs = np.empty((0, num_objectives))
        self._ranks = np.empty(0, dtype=np.int64)
        self._settled = True  # nothing promotable, as long as nobody comes

    def add(self, name: str, costs: Array, *, promoted: bool) -> None:
        """Ranks a trial that is new; those that it dominates move back, and those behind them.

        Li et al. 2014, Efficient Non-domination Level Update, KanGAL 2014014.
        """
        if promoted:
            self.promoted.add(name)
        if name in self._known:
            return
        self._known.add(name)
        rank = int(self._ranks[self._dominating(name, costs)].max(initial=-1)) + 1
        self._names.append(name)
        self._costs = np.vstack([self._costs, costs])
        self._ranks = np.append(self._ranks, rank)
        moving = [len(self._names) - 1]
        while moving:
            behind = np.zeros(len(self._names), dtype=bool)
            for index in moving:
                behind |= self._dominated(self._names[index], self._costs[index])
            behind &= self._ranks == rank
            behind[moving] = False
            moving = np.flatnonzero(behind).tolist()
            rank += 1
            self._ranks[moving] = rank
        self._settled = False

    def promotable(self) -> Iterator[str]:
        """Trials to be promoted, controls first, then the best."""
        controls = self._best_controls() - self.promoted
        yield from sorted(controls)
        if self._settled:
            return
        room = len(self._names) // self._reduction_factor
        found = False
        for rank in range(int(self._ranks.max()) + 1):
            level = np.flatnonzero(self._ranks == rank)
            admitted = len(level) if rank == 0 else min(len(level), room)
            room -= len(level)
            gone = self.promoted | controls
            waiting = {n for n in level.tolist() if self._names[n] not in gone}
            if admitted > 0 and waiting:
                for index in self._in_epsilon_net_order(level)[:admitted]:
                    if index in waiting:
                        found = True
                        yield self._names[index]
            if room <= 0:
                break
        self._settled = not found

    def _best_controls(self) -> set[str]:
        places = [n for n, name in enumerate(self._names) if name in self.controls]
        return {
            self._names[n]
            for n in places
            if not self._dominating(self._names[n], self._costs[n])[places].any()
        }

    def _in_epsilon_net_order(self, level: npt.NDArray[np.int64]) -> list[int]:
        """The best in the first objective, then always the one farthest from those before.

        Schmucker et al. 2021, section 3.2; distances in units of the rung's range.
        """
        spread = np.ptp(self._costs, axis=0)
        points = self._costs[level] / np.where(spread > 0, spread, 1.0)
        left = sorted(range(len(level)), key=lambda n: (*points[n], self._names[level[n]]))
        chosen = [left.pop(0)]
        distance = np.linalg.norm(points - points[chosen[0]], axis=1)
        while left:
            chosen.append(left.pop(int(np.argmax(distance[left]))))
            distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
        return [int(level[n]) for n in chosen]

    def _dominating(self, name: str, costs: Array) -> npt.NDArray[np.bool_]:
        """Who is before a trial: of equal ones the first by name."""
        before = np.asarray((self._costs <= costs).all(axis=1))
        for index in np.flatnonzero(before & (self._costs == costs).all(axis=1)):
            before[index] = self._names[index] < name
        return before

    def _dominated(self, name: str, costs: Array) -> npt.NDArray[np.bool_]:
        behind = np.asarray((self._costs >= costs).all(axis=1))
        for index in np.flatnonzero(behind & (self._costs == costs).all(axis=1)):
            behind[index] = self._names[index] > name
        return behind


def _costs(objectives: Mapping[str, str], rung: int, result: TrialResult) -> Array | None:
    """Less is better; None where an objective was not measured."""
    costs = []
    for metric, direction in objectives.items():
        at_rung = metric in RISING
        value = result.accuracy_by_fidelity[rung] if at_rung else result.metric(metric)
        if value is None:
            return None
        costs.append(-value if at_rung or direction == "maximize" else value)
    return np.array(costs)


# --- how well a rung foretells the next ------------------------------------------------------


@dataclass(frozen=True)
class RankCorrelation:
    """How alike two fidelities rank the same trials.

    Attributes:
        low: The lower fidelity.
        high: The higher one.
        spearman: Rank correlation of their accuracies, -1 to 1; None where all are equal.
        num_trials: Over how many trials.
    """

    low: int
    high: int
    spearman: float | None
    num_trials: int

    @property
    def warning(self) -> str | None:
        """What to do about it when it is poor."""
        if self.num_trials < ENOUGH or self.spearman is None or self.spearman >= POOR:
            return None
        remedy = "search.early_stop: false" if self.low == 0 else "a longer search.short_share"
        return (
            f"fidelity {self.low} foretells accuracy at fidelity {self.high} poorly: rank "
            f"correlation {self.spearman:.2f} over {self.num_trials} trials. Early stopping may "
            f"have lost good trials: use {remedy}."
        )


def rank_correlations(results: Iterable[TrialResult]) -> list[RankCorrelation]:
    """Spearman's rank correlation of accuracy between each two fidelities of a run.

    Over the trials that reached both. Where trials were stopped early those are the promoted
    ones: among the best few the order is harder to foretell, so a value over them errs on the low
    side of what it would be over all. A run without early stopping has no such bias.
    """
    known = [r.accuracy_by_fidelity for r in results if r.status is not TrialStatus.DUPLICATE]
    found = []
    for low, high in combinations(range(FULL_FIDELITY + 1), 2):
        pairs = [
            (row[low], row[high])
            for row in known
            if len(row) > high and row[low] is not None and row[high] is not None
        ]
        if len(pairs) > 1:
            first, second = np.array(pairs, dtype=np.float64).T
            found.append(RankCorrelation(low, high, _spearman(first, second), len(pairs)))
    return found


def _spearman(first: Array, second: Array) -> float | None:
    ranks = _ranks(first), _ranks(second)
    if min(np.ptp(r) for r in ranks) == 0:
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: Array) -> Array:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Array = (last - (counts - 1) / 2)[inverse]
    return ranks
