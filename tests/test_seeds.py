"""Knapsacks against brute force; seeds lie in the space, differ, and keep what they promise."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ranked

from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.layer_costs import LayerCosts
from prunesearch.methods.models.build import build_model
from prunesearch.search.config import SearchConfig, parse_config
from prunesearch.search.costs import Costs
from prunesearch.search.knapsack import Item, Problem, cheapest_damage, solve
from prunesearch.search.seeds import default_seeds, knapsack_seeds, make_seeds
from prunesearch.search.sensitivity import Entry, SensitivityTable, levels, neutral
from prunesearch.search.space import Space

ORDER = ("layer2.1", "layer1.2", "layer3.1", "layer1.1", "layer3.2", "layer2.2")
OBJECTIVES = {"accuracy": "maximize", "macs": "minimize"}


# --- the dynamic programme -------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_every_budget_and_count_has_the_optimum_of_all_combinations(seed):
    draw = np.random.default_rng(seed)
    sizes = (3, 2, 4, 2)
    costs = [draw.integers(0, 6, n).astype(float) for n in sizes]
    damages = [draw.random(n) for n in sizes]
    counts = [draw.integers(0, 2, n) for n in sizes]
    found, chosen = cheapest_damage(costs, damages, counts, bins=12, max_count=2)
    assert [picks.shape for picks in chosen] == [(3, 13)] * 4
    for limit, budget in itertools.product(range(3), range(13)):
        best = min(
            (
                sum(d[i] for d, i in zip(damages, combination, strict=True))
                for combination in itertools.product(*map(range, sizes))
                if sum(c[i] for c, i in zip(costs, combination, strict=True)) <= budget
                and sum(n[i] for n, i in zip(counts, combination, strict=True)) <= limit
            ),
            default=np.inf,
        )
        assert found[limit, budget] == pytest.approx(best)


def products(damages: dict[str, tuple[float, ...]], max_count: int) -> Problem:
    """Neighbouring widths multiply, as those of layers do; two blocks take what they hold."""
    widths = (1.0, 0.8, 0.6, 0.4)
    items = [Item(name, widths) for name in ("a", "b", "c")]
    items += [Item(name, (False, True), (False, True)) for name in ("x", "y")]

    def cost(choice: Any) -> float:
        a, b, c = (choice[name] for name in "abc")
        return 3 * a + 5 * a * b * (not choice["x"]) + 2 * b * b * (not choice["y"]) + 4 * b * c

    def damage(choice: Any) -> float:
        return sum(damages[i.name][i.values.index(choice[i.name])] for i in items)

    return Problem(tuple(items), max_count, cost, damage)


@pytest.mark.parametrize("seed", range(6))
def test_costs_that_multiply_are_met_at_nearly_the_least_damage(seed):
    draw = np.random.default_rng(seed)
    damages = {n: (0.0, *np.cumsum(draw.random(3))) for n in "abc"}
    damages |= {n: (0.0, float(draw.random() * 2)) for n in "xy"}
    problem = products(damages, max_count=1)
    targets = [14 * share for share in (0.85, 0.7, 0.55, 0.4)]
    names = [item.name for item in problem.items]
    every = [
        dict(zip(names, values, strict=True))
        for values in itertools.product(*(item.values for item in problem.items))
    ]
    every = [choice for choice in every if not (choice["x"] and choice["y"])]
    for target, choice in zip(targets, solve(problem, targets), strict=True):
        assert choice is not None and problem.cost(choice) <= target
        assert not (choice["x"] and choice["y"])
        best = min(problem.damage(c) for c in every if problem.cost(c) <= target)
        assert problem.damage(choice) <= 1.15 * best + 1e-9


def test_a_target_that_nothing_reaches_has_no_choice():
    problem = products({n: (0.0, 0.1, 0.2, 0.3) for n in "abcxy"}, max_count=2)
    least, most = solve(problem, [0.1, 100.0])
    assert least is None
    assert most == {"a": 1.0, "b": 1.0, "c": 1.0, "x": False, "y": False}


# --- seeds -----------------------------------------------------------------------------------


def config(trials: int = 40, **space: Any) -> SearchConfig:
    data = {"model": {"name": "resnet20"}, "data": {"name": "digits"}, "space": space}
    return parse_config(data | {"objectives": OBJECTIVES, "search": {"trials": trials}})


@pytest.fixture(scope="module")
def layers() -> tuple[Any, LayerCosts]:
    model, images = build_model("resnet20", num_classes=10), torch.zeros(2, 3, 16, 16)
    plan = plan_pruning(model, images)
    return plan, LayerCosts(model, plan, images)


@pytest.fixture
def make(layers):
    def made(**options: Any) -> tuple[Space, SensitivityTable, Costs]:
        plan, costs = layers
        space = Space(config(**options).space, plan, ranked(ORDER))
        entries = []
        for level in levels(space):
            if level.dimension.startswith("criterion:"):
                continue
            gone = abs(level.value - neutral(level.dimension))
            candidate = space.candidate(level.params)
            macs = round(costs.macs(dict(candidate.keep)) * (candidate.k or 1) ** 2)
            loss = 0.1 * (1 + gone * (1 + len(level.dimension) % 3))
            entries.append(Entry(level.dimension, level.value, 0.9 - gone / 10, loss, macs, 1))
        table = SensitivityTable(
            0.95, 0.1, costs.macs({}), costs.num_params({}), "fgp", tuple(entries),
            factors={"fgp": 1.0, "taylor": 1.1, "random": 3.0},
            blocks=space.block_order, max_blocks=space.max_blocks,
        )  # fmt: skip
        return space, table, Costs(space, costs, table)

    return made


@pytest.mark.parametrize("mode", ["mask", "ranked", "none"])
@pytest.mark.parametrize("per", ["model", "stage", "group"])
def test_knapsack_seeds_lie_in_the_space_and_meet_their_targets(make, mode, per):
    space, table, costs = make(
        blocks={"mode": mode, "max_drop": 0.34},
        keep={"per": per, "low": 0.25, "round_to": 4},
        criteria=["random", "taylor", "fgp"],
        select=["cumulative", "ratio"],
    )
    seeds = knapsack_seeds(space, table, costs, OBJECTIVES)
    assert len(seeds) >= 5
    for seed in seeds:
        space.distributions(seed.params)
        candidate = space.candidate(seed.params)
        assert len(candidate.dropped_blocks) <= space.max_blocks <= 2
        assert candidate.criterion in ("fgp", "taylor", None) and candidate.select != "cumulative"
        target = float(seed.origin.removeprefix("seed: knapsack macs "))
        assert target - 0.15 < costs.macs(seed.params) / table.macs <= target
    assert {space.candidate(seed.params).criterion for seed in seeds} >= {"fgp", "taylor"}
    every = make_seeds(space, 100, seeds)
    candidates = [space.candidate(seed.params) for seed in every]
    assert len(set(candidates)) == len(candidates) > len(seeds)
    assert every[0].origin == "seed: dense" and every[1] == seeds[0]
    assert any(seed.origin.startswith("seed: uniform") for seed in every[:8])


@pytest.mark.parametrize("rule", ["cumulative", "global", "macs"])
def test_rules_of_one_fraction_have_knapsacks_too(make, rule):
    space, table, costs = make(select=[rule], criteria=["taylor", "dsd"])
    seeds = knapsack_seeds(space, table, costs, OBJECTIVES)
    assert seeds and all(space.admits(seed.params) for seed in seeds)
    assert {space.candidate(seed.params).select for seed in seeds} >= {rule}


def test_a_space_of_blocks_alone_has_knapsacks_too(make):
    space, table, costs = make(criteria=[], blocks={"max_drop": 1.0})
    seeds = knapsack_seeds(space, table, costs, OBJECTIVES)
    assert seeds and all(space.candidate(seed.params).criterion is None for seed in seeds)


def test_without_a_cost_objective_or_a_rule_that_chooses_there_are_none(make):
    assert knapsack_seeds(*make(), {"accuracy": "maximize", "loss": "minimize"}) == []
    assert knapsack_seeds(*make(select=["rand30"]), OBJECTIVES) == []
    assert knapsack_seeds(*make(criteria=["dsd"]), OBJECTIVES) == []


def test_an_unmeasured_dimension_is_left_alone(make):
    space, table, costs = make(select=["ratio"])
    some = tuple(e for e in table.entries if e.dimension in ("keep:stage2", "drop:layer2.1"))
    less = SensitivityTable(**{**vars(table), "entries": some})
    for seed in knapsack_seeds(space, less, costs, OBJECTIVES):
        assert seed.params["keep:stage1"] == seed.params["keep:stage3"] == 1.0
        assert set(space.candidate(seed.params).dropped_blocks) <= {"layer2.1"}


def test_seeds_take_a_smaller_share_of_the_trials_where_they_were_measured(make):
    space, table, costs = make()
    ladders = default_seeds(space, config())
    measured = default_seeds(space, config(), table, costs)
    assert len(ladders) == 16 and len(measured) == 8
    assert sum(seed.origin.startswith("seed: knapsack") for seed in measured) >= 4
    off = config().model_copy(
        update={"search": config().search.model_copy(update={"seeds": False})}
    )
    assert default_seeds(space, off, table, costs) == []
