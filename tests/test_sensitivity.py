"""The sensitivity table: additive by hand, monotone, exact costs, measured once a run."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ranked

from prunesearch.methods.layer_costs import LayerCosts
from prunesearch.methods.measure import count_macs, count_params
from prunesearch.methods.models.build import build_model
from prunesearch.methods.sensitivity import measure_edit
from prunesearch.methods.surgery import Recipe, apply
from prunesearch.search.config import SearchConfig, parse_config
from prunesearch.search.costs import Costs
from prunesearch.search.dense import prepare_dense
from prunesearch.search.sensitivity import (
    SENSITIVITY,
    Entry,
    SensitivityTable,
    levels,
    max_evaluations,
    measure_sensitivity,
)
from prunesearch.search.setup import Problem, make_space, pose
from prunesearch.search.space import Space
from prunesearch.search.store import read_as, write_json

STAGES = ("keep:stage1", "keep:stage2", "keep:stage3")


def odds(accuracy: float) -> float:
    return math.log(accuracy / (1 - accuracy))


@pytest.fixture
def table() -> SensitivityTable:
    return SensitivityTable(
        accuracy=0.9,
        loss=0.3,
        macs=1000,
        num_params=100,
        criterion="fgp",
        entries=(
            Entry("drop:a", 1.0, 0.8, 0.5, 800, 80),
            Entry("drop:b", 1.0, 0.95, 0.2, 700, 90),  # better than dense: noise, no damage
            Entry("keep:stage1", 0.5, 0.7, 0.9, 500, 50),
            Entry("keep:stage1", 0.75, 0.85, 0.4, 750, 75),
            Entry("keep:stage1", 0.25, 0.72, 0.8, 250, 25),  # better than at 0.5: raised to it
        ),
        factors={"fgp": 1.0, "random": 2.0},
        blocks=("b", "a"),
        max_blocks=2,
        lost={"keep:stage1": {"a": 0.25, "b": 0.75}},
    )


def test_log_losses_add_up(table):
    found = table.predict(
        {"drop:a": True, "drop:b": False, "criterion": "fgp", "keep:stage1": 0.5}
    )
    # a quarter of stage1's groups are in block a, so three quarters of its damage stay
    assert found.loss == pytest.approx(0.3 * (0.5 / 0.3) * (0.9 / 0.3) ** 0.75)


def test_accuracy_follows_the_loss_along_the_entries(table):
    damages = [math.log(e.loss / 0.3) for e in table.entries]
    falls = [odds(0.9) - odds(e.accuracy) for e in table.entries]
    slope = sum(d * f for d, f in zip(damages, falls, strict=True)) / sum(d * d for d in damages)
    found = table.predict({"drop:a": True})
    assert odds(found.accuracy) == pytest.approx(odds(0.9) - slope * math.log(0.5 / 0.3))


def test_the_damage_grows_with_the_square_between_levels_and_never_falls(table):
    def damage(keep: float, criterion: str = "fgp") -> float:
        return table.damage({"criterion": criterion, "keep:stage1": keep})

    first, second = math.log(0.4 / 0.3), math.log(0.9 / 0.3)
    assert damage(1.0) == 0
    assert damage(0.75) == pytest.approx(first) and damage(0.5) == pytest.approx(second)
    assert damage(0.875) == pytest.approx(first / 4)
    share = (0.375**2 - 0.25**2) / (0.5**2 - 0.25**2)
    assert damage(0.625) == pytest.approx(first + share * (second - first))
    assert damage(0.25) == pytest.approx(second) == damage(0.1)
    assert damage(0.75, "random") == pytest.approx(2 * first)
    assert damage(0.75, "unknown") == pytest.approx(first)


def test_noise_that_helps_and_what_was_not_measured_cost_nothing(table):
    for params in ({}, {"drop:b": True}, {"keep:stage9": 0.1}, {"num_blocks": 3}):
        assert table.predict(params).accuracy == pytest.approx(0.9)
        assert table.predict(params).loss == 0.3


def test_a_mask_over_the_limit_counts_the_best_ranked_blocks(table):
    assert table.dropped({"drop:a": True, "drop:b": True}) == ("b", "a")
    one = SensitivityTable(**{**vars(table), "max_blocks": 1})
    assert one.predict({"drop:a": True, "drop:b": True}).loss == pytest.approx(0.3)


def test_the_table_survives_json(table, tmp_path):
    write_json(tmp_path / SENSITIVITY, table.to_json())
    assert read_as(tmp_path / SENSITIVITY, SensitivityTable) == table


# --- measured --------------------------------------------------------------------------------


def config(**space: Any) -> SearchConfig:
    return parse_config(
        {
            "model": {"name": "resnet20"},
            "data": {"name": "digits", "image_size": 8, "limit": 250, "batch_size": 32},
            "baseline": {"epochs": 1, "lr": 0.05},
            "space": {
                "criteria": ["random", "magnitude_l1"],
                "blocks": {"order": "sequential"},
                "keep": {"per": "stage", "low": 0.3},
                **space,
            },
            "search": {"trials": 80},
        }
    )


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> tuple[Problem, Space, Path]:
    posed = pose(config())
    folder = tmp_path_factory.mktemp("run")
    prepare_dense(posed, folder, lambda message: None)
    return posed, make_space(posed, folder, lambda message: None), folder


def test_a_run_measures_once_and_reads_afterwards(problem):
    posed, space, folder = problem
    said: list[str] = []
    table = measure_sensitivity(posed, space, 0.5, folder, said.append)
    assert table is not None and table.criterion == "magnitude_l1"
    assert len(table.entries) < max_evaluations(posed.config, posed)
    assert {e.dimension for e in table.entries} >= {*STAGES}
    assert len(said) == 1 and "edits measured alone" in said[0]
    stored = (folder / SENSITIVITY).read_bytes()
    again = measure_sensitivity(posed, space, 0.5, folder, said.append)
    assert again == table and len(said) == 1
    assert (folder / SENSITIVITY).read_bytes() == stored


def test_an_edit_is_measured_with_its_own_statistics_and_the_model_stays(problem):
    posed, _, _ = problem
    before = {k: v.clone() for k, v in posed.model.state_dict().items()}
    recipe = Recipe((posed.blocks[0],), {"layer3.0.conv1": tuple(range(20))})

    def measure(**options: Any) -> tuple[float, float]:
        found = measure_edit(posed.model, posed.plan, recipe, posed.task, **options)
        return found.accuracy, found.loss

    assert measure() == measure() != measure(recalibrate_bn=False)
    pruned = apply(copy.deepcopy(posed.model), posed.plan, recipe)
    whole = posed.task.evaluate(pruned, "val")
    assert measure(recalibrate_bn=False) == pytest.approx((whole["accuracy"], whole["loss"]))
    assert all(torch.equal(v, before[k]) for k, v in posed.model.state_dict().items())


def test_levels_are_distinct_and_begin_with_blocks_and_middle_widths(problem):
    posed, _, _ = problem
    space = Space(config().space, posed.plan, ranked(("layer2.1", "layer1.1")))
    found = levels(space)
    first = [level.dimension for level in found[:4]]
    assert first == ["keep:stage1", "drop:layer2.1", "keep:stage2", "drop:layer1.1"]
    assert [e.dimension for e in found if e.dimension.startswith("criterion:")] == [
        "criterion:magnitude_l1", "criterion:random",
    ]  # fmt: skip
    candidates = [space.candidate(level.params) for level in found]
    assert len(set(candidates)) == len(candidates)
    assert {c.criterion for c in candidates[:4]} == {None, "magnitude_l1"}
    one_width = config(keep={"low": 0.9, "round_to": 64}, select=["ratio"]).space
    assert levels(Space(one_width, posed.plan, ranked(()))) == []


# --- costs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20", "vgg16_cifar", "torchvision:resnext50_32x4d"])
def test_costs_are_those_of_the_built_model(name):
    from prunesearch.methods.blocks import removable_blocks
    from prunesearch.methods.groups import plan_pruning

    torch.manual_seed(0)
    model, images = build_model(name, num_classes=10).eval(), torch.randn(2, 3, 32, 32)
    plan = plan_pruning(model, images)
    dropped = tuple(sorted(removable_blocks(model, images)[1::3]))
    kept, keep = {}, {}
    for index, group in enumerate(plan.alive(dropped)):
        columns = group.num_channels // group.parts
        stay = max(1, columns * (3 + index % 5) // 8)
        kept[group.name] = tuple(p * columns + i for p in range(group.parts) for i in range(stay))
        keep[group.name] = stay / columns
    pruned = apply(copy.deepcopy(model), plan, Recipe(dropped, kept))
    costs = LayerCosts(model, plan, images)
    assert costs.macs({}) == count_macs(model, images)
    assert costs.macs(keep, dropped) == count_macs(pruned, images)
    assert costs.num_params(keep, dropped) == count_params(pruned)


def test_costs_of_parameters_are_those_of_their_candidate(problem):
    posed, space, _ = problem
    costs = Costs(space, LayerCosts(posed.model, posed.plan, posed.task.example_input()))
    params = space.block_params(1) | space.channel_params("magnitude_l1", 0.6)
    candidate = space.candidate(params)
    assert candidate.dropped_blocks
    kept = {
        name: tuple(range(round(keep * posed.plan[name].num_channels)))
        for name, keep in candidate.keep
    }
    recipe = Recipe(candidate.dropped_blocks, kept)
    pruned = apply(copy.deepcopy(posed.model), posed.plan, recipe)
    assert costs.macs(params) == count_macs(pruned, posed.task.example_input())
    assert costs.num_params(params) == count_params(pruned)
