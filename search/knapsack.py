"""Combinations of levels that cost little and do little damage: a multiple-choice knapsack.

One dynamic programme over a discretised, additive cost gives a best combination for every budget
at once (Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, section 11.5). Real costs are not
additive (a layer's MACs are the product of two widths), so the combinations of all budgets, from
cost tables around several starting points, are costed exactly before one is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BINS = 400
ROUNDS = 3  # how often the cost table is made anew around what was found


@dataclass(frozen=True)
class Item:
    """One dimension: exactly one of its values is chosen.

    Attributes:
        name: The parameter.
        values: Its values, each removing more than the one before it.
        counts: Whether each value uses up one of the limited removals (blocks).
    """

    name: str
    values: tuple[Any, ...]
    counts: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Problem:
    """What to choose from, and how a choice is judged.

    Attributes:
        items: The dimensions.
        max_count: How many counting values may be chosen.
        cost: Exact cost of a choice (name -> value).
        damage: Its damage.
    """

    items: tuple[Item, ...]
    max_count: int
    cost: Callable[[Mapping[str, Any]], float]
    damage: Callable[[Mapping[str, Any]], float]


Choice = dict[str, Any]


def solve(problem: Problem, targets: Sequence[float]) -> list[Choice | None]:
    """For each target the choice of least damage among those found that cost at most so much.

    Args:
        problem: What to choose from.
        targets: Largest costs.

    Returns:
        A choice for each target; None where nothing that cheap was found.
    """
    least = {item.name: item.values[0] for item in problem.items}
    pool: dict[tuple[Any, ...], tuple[float, float, Choice]] = {}
    anchors = [least]
    best: list[Choice | None] = [None] * len(targets)
    for _ in range(ROUNDS):
        for anchor in anchors:
            for choice in _family(problem, anchor):
                key = tuple(choice.values())
                if key not in pool:
                    pool[key] = problem.cost(choice), problem.damage(choice), choice
        found = [_best(pool.values(), target) for target in targets]
        if found == best:
            break
        anchors = [c for c, old in zip(found, best, strict=True) if c is not None and c != old]
        best = found
    return [
        None if choice is None else _improved(problem, choice, target)
        for choice, target in zip(best, targets, strict=True)
    ]


def cheapest_damage(
    costs: Sequence[Array],
    damages: Sequence[Array],
    counts: Sequence[NDArray[np.int64]],
    *,
    bins: int,
    max_count: int,
) -> tuple[Array, list[NDArray[np.int16]]]:
    """The dynamic programme: least damage for every budget and every number of removals.

    Args:
        costs: For each item its values' costs in whole bins, >= 0, [values].
        damages: Their damages, [values].
        counts: Removals that each value uses, [values].
        bins: Largest budget.
        max_count: Most removals.

    Returns:
        Least damage at most that budget and so many removals, [max_count + 1, bins + 1], infinite
        where there is none; and for each item the value that reaches it, of the same shape.
    """
    table = np.zeros((max_count + 1, bins + 1))
    chosen = []
    for cost, damage, count in zip(costs, damages, counts, strict=True):
        options = np.full((len(cost), max_count + 1, bins + 1), np.inf)
        for index, (c, d, n) in enumerate(zip(cost, damage, count, strict=True)):
            if c <= bins and n <= max_count:
                rest = table[: max_count + 1 - n, : bins + 1 - int(c)]
                options[index, n:, int(c) :] = rest + d
        picks = options.argmin(axis=0)
        table = np.take_along_axis(options, picks[None], axis=0)[0]
        chosen.append(picks.astype(np.int16))
    return table, chosen


def _family(problem: Problem, anchor: Choice) -> Iterator[Choice]:
    """A best choice for every budget, with each value's cost and damage taken beside `anchor`."""
    at_anchor = problem.cost(anchor)
    costs, damages = [], []
    damage = problem.damage(anchor)
    for item in problem.items:
        others = [anchor | {item.name: value} for value in item.values]
        costs.append(np.array([problem.cost(other) - at_anchor for other in others]))
        damages.append(np.array([problem.damage(other) - damage for other in others]))
    costs = [cost - cost.min() for cost in costs]
    unit = sum(float(cost.max()) for cost in costs) / BINS
    if unit <= 0:
        return
    steps = [np.rint(cost / unit) for cost in costs]
    counts = [
        np.array(item.counts or [False] * len(item.values), dtype=np.int64)
        for item in problem.items
    ]
    table, chosen = cheapest_damage(steps, damages, counts, bins=BINS, max_count=problem.max_count)
    last = None
    for budget in range(BINS + 1):
        row = problem.max_count
        if not np.isfinite(table[row, budget]) or table[row, budget] == last:
            continue
        last = table[row, budget]
        yield _traced(problem.items, steps, counts, chosen, row, budget)


def _traced(
    items: Sequence[Item],
    steps: Sequence[Array],
    counts: Sequence[NDArray[np.int64]],
    chosen: Sequence[NDArray[np.int16]],
    row: int,
    budget: int,
) -> Choice:
    choice: Choice = {}
    for item, step, count, picks in reversed(list(zip(items, steps, counts, chosen, strict=True))):
        index = int(picks[row, budget])
        choice[item.name] = item.values[index]
        row -= int(count[index])
        budget -= int(step[index])
    return {item.name: choice[item.name] for item in items}


def _best(pool: Any, target: float) -> Choice | None:
    affordable = [(damage, cost, choice) for cost, damage, choice in pool if cost <= target]
    return min(affordable, key=lambda one: one[:2])[2] if affordable else None


def _improved(problem: Problem, choice: Choice, target: float) -> Choice:
    """Removes one step less of something as long as the target allows it: rounding left room."""
    damage = problem.damage(choice)
    while True:
        judged = []
        for item in problem.items:
            index = item.values.index(choice[item.name])
            if index > 0:
                other = choice | {item.name: item.values[index - 1]}
                judged.append((problem.damage(other), other))
        better = sorted((one for one in judged if one[0] < damage), key=lambda one: one[0])
        affordable = next((one for one in better if problem.cost(one[1]) <= target), None)
        if affordable is None:
            return choice
        damage, choice = affordable
