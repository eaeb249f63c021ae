"""Where a search starts: known good candidates, tried before the sampler proposes any."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from .config import SearchConfig
from .costs import Costs
from .knapsack import Item, Problem, solve
from .records import Candidate
from .sensitivity import SensitivityTable
from .space import CRITERION, DSD, FRACTION_OF, NUM_BLOCKS, SELECT, Params, Space

SEED_SHARE = 0.2  # at most this share of the trials are seed candidates
LADDER_SHARE = 0.4  # the same where nothing was measured and only ladders are left
TARGETS = (0.55, 0.3, 0.75, 0.4, 0.2, 0.85)  # of the dense cost; the first ones span the front
NEARLY = 1.3  # a criterion that does at most so many times the least damage is a good one
NUM_LEVELS = 9  # values of a fraction that a knapsack chooses from, at least
FEW_DIMENSIONS = 60  # values of all fractions together where those are few
UNIFORM_KEEPS = (0.9, 0.75, 0.6, 0.45, 0.3)


@dataclass(frozen=True)
class Seed:
    """Parameters to try first, and where they come from."""

    origin: str
    params: Params


def default_seeds(
    space: Space,
    config: SearchConfig,
    table: SensitivityTable | None = None,
    costs: Costs | None = None,
) -> list[Seed]:
    """The seeds of a search: none where they are switched off, else a share of its trials."""
    if not config.search.seeds:
        return []
    if table is None or costs is None:
        return make_seeds(space, int(LADDER_SHARE * config.search.trials))
    knapsack = knapsack_seeds(space, table, costs, config.objectives)
    share = SEED_SHARE if knapsack else LADDER_SHARE
    return make_seeds(space, int(share * config.search.trials), knapsack)


def make_seeds(space: Space, limit: int, knapsack: Sequence[Seed] = ()) -> list[Seed]:
    """Known good starts: dense, knapsacks, each criterion's uniform ladder, the ranked path.

    Each ladder gives every second rung first, so that few seeds already span it. Seeds that the
    space's bounds do not admit are left out, and so are repeated ones.

    Args:
        space: The space.
        limit: How many seeds, at most.
        knapsack: From `knapsack_seeds`; as many come first as there are others in the ladders'
            first round, then the two take turns.
    """
    ladders = [_uniform(space, criterion) for criterion in space.criteria]
    ladders.append(
        [Seed("seed: ranked blocks", _ranked(space, n)) for n in range(1, space.max_blocks + 1)]
    )
    others = list(_in_turn(map(_spread, ladders)))
    return _admitted(space, [_least_pruned(space), *_mixed(knapsack, others)])[:limit]


def knapsack_seeds(
    space: Space, table: SensitivityTable, costs: Costs, objectives: Mapping[str, str]
) -> list[Seed]:
    """Combinations that the table expects to do the least damage at several costs.

    Args:
        space: The space.
        table: Damage of each level.
        costs: Cost of any combination.
        objectives: The run's; the first one that is a cost gives the targets.

    Returns:
        The seeds, those that span the front first; none where no objective is a cost.
    """
    found = costs.objective(objectives)
    bases = _channels(space, table)
    if found is None or not bases:
        return []
    metric, cost = found
    dense = cost(_ranked(space, 0))
    choices = [_solved(space, table, base, cost, dense) for base in bases]
    seeds = []
    for index, target in enumerate(TARGETS):
        params = choices[index % len(bases)][index]  # good criteria in turn
        if params is not None:
            seeds.append(Seed(f"seed: knapsack {metric} {target:g}", params))
    return seeds


def _solved(
    space: Space,
    table: SensitivityTable,
    base: Params,
    cost: Callable[[Mapping[str, Any]], float],
    dense: float,
) -> list[Params | None]:
    """For each target the parameters, `base` where nothing is chosen."""
    problem = Problem(
        items=tuple(_items(space, table, base)),
        max_count=space.max_blocks,
        cost=lambda choice: cost({**base, **choice}),
        damage=lambda choice: table.damage({**base, **choice}),
    )
    found = solve(problem, [target * dense for target in TARGETS])
    return [None if choice is None else base | choice for choice in found]


def _channels(space: Space, table: SensitivityTable) -> list[Params]:
    """Parameters with no block dropped and as many channels kept as may be, by good criteria.

    None where the rules leave nothing to choose.
    """
    if not space.criteria:
        return [space.block_params(0)]
    rule = next((r for r in ("ratio", *FRACTION_OF) if r in space.config.select), None)
    if rule is None:
        return []
    names = space.keep_names() if rule == "ratio" else [FRACTION_OF[rule]]
    kept = dict.fromkeys(names, space.fraction_bounds(rule).high)
    return [
        space.block_params(0) | {CRITERION: criterion, SELECT: rule} | kept
        for criterion in _good_criteria(space, table)
    ]


def _good_criteria(space: Space, table: SensitivityTable) -> list[str]:
    """The criteria that do about the least damage, and train nothing, the best first."""
    able = [name for name in space.criteria if name not in (DSD, "random")]
    factors = {name: table.factors.get(name) for name in able}
    known = {name: factor for name, factor in factors.items() if factor is not None}
    if not known:
        return able[:1]
    best = min(known.values())
    return sorted((n for n in known if known[n] <= NEARLY * best), key=lambda n: known[n])


def _items(space: Space, table: SensitivityTable, base: Params) -> Iterator[Item]:
    """The dimensions that have entries, with the values to choose from."""
    names = [name for name in base if name in table.dimensions]
    fractions = sum(isinstance(base[name], float) for name in names)
    count = max(NUM_LEVELS, FEW_DIMENSIONS // max(1, fractions))
    for name in names:
        value = base[name]
        if name == NUM_BLOCKS:
            yield Item(name, tuple(range(space.max_blocks + 1)))
        elif isinstance(value, bool):
            yield Item(name, (False, True), (False, True))
        else:
            rule = str(base[SELECT])
            low = space.fraction_bounds(rule).low
            spaced = [space.on_grid(rule, float(v)) for v in np.linspace(value, low, count)]
            yield Item(name, tuple(dict.fromkeys(spaced)))


def _mixed(knapsack: Sequence[Seed], others: Sequence[Seed]) -> list[Seed]:
    """The knapsacks' first half, then the two in turn."""
    half = (len(knapsack) + 1) // 2
    return [*knapsack[:half], *_in_turn([list(knapsack[half:]), list(others)])]


def _uniform(space: Space, criterion: str) -> list[Seed]:
    origin = f"seed: {_ladder(space, criterion)}"
    return [
        Seed(origin, space.block_params(0) | space.channel_params(criterion, keep))
        for keep in UNIFORM_KEEPS
    ]


def _ladder(space: Space, criterion: str) -> str:
    """Only equal fractions in all groups are the control that is called uniform pruning."""
    if criterion != DSD and "ratio" in space.config.select:
        return f"uniform {criterion}"
    return f"{criterion} ladder"


def _least_pruned(space: Space) -> Seed:
    params = _ranked(space, 0)
    dense = space.admits(params) and space.candidate(params) == Candidate()
    return Seed("seed: dense" if dense else "seed: least pruned", params)


def _ranked(space: Space, num_dropped: int) -> Params:
    """The first blocks of the ranked path gone, and as many channels kept as may be."""
    if not space.criteria:
        return space.block_params(num_dropped)
    plain = [criterion for criterion in space.criteria if criterion != DSD]
    return space.block_params(num_dropped) | space.channel_params(
        (plain or [DSD])[0], _most_kept(space)
    )


def _most_kept(space: Space) -> float:
    """The largest fraction under the first rule of the space."""
    rule = space.first_rule
    return space.fraction_bounds(rule).high if rule in ("ratio", *FRACTION_OF) else 1.0


def _spread(ladder: list[Seed]) -> list[Seed]:
    """Every second rung first, so that few of them already span the ladder."""
    return ladder[1::2] + ladder[::2]


def _in_turn(ladders: Iterable[list[Seed]]) -> Iterator[Seed]:
    for row in zip_longest(*ladders):
        yield from (seed for seed in row if seed is not None)


def _admitted(space: Space, seeds: Iterable[Seed]) -> list[Seed]:
    """Those within the space's bounds, each candidate once."""
    admitted: list[Seed] = []
    known: set[Candidate] = set()
    for seed in seeds:
        if space.admits(seed.params) and (c := space.candidate(seed.params)) not in known:
            known.add(c)
            admitted.append(seed)
    return admitted
