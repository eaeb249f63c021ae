"""Pruning in two steps is pruning at once, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.models.build import build_model
from prunesearch.methods.restrict import compose, restrict
from prunesearch.methods.surgery import PruningPlan, Recipe, apply
from prunesearch.methods.tasks.no_data import NoData


class Concat(nn.Module):
    """Two branches side by side; a sum, a flatten and a linear layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 3, padding=1)
        self.right = nn.Conv2d(3, 9, 1)
        self.norm = nn.BatchNorm2d(15)
        self.mix = nn.Conv2d(15, 8, 3, padding=1, groups=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.side = nn.Conv2d(15, 12, 1)
        self.fc = nn.Linear(12 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.cat([self.left(x), self.right(x)], 1)).relu()
        x = self.grouped(self.mix(x).relu()) + self.side(x)
        out: Tensor = self.fc(x.flatten(1))
        return out


MODELS: list[tuple[str, dict[str, Any], int, tuple[str, ...]]] = [
    ("resnet20", {"shortcut": "A"}, 16, ()),
    ("resnet20", {"shortcut": "B"}, 16, ("layer1.0", "layer3.2")),
    ("resnet20", {"shortcut": "A"}, 16, ("layer1.1", "layer2.2")),
    ("torchvision:mobilenet_v2", {}, 32, ()),
    ("torchvision:mobilenet_v2", {}, 32, ("features.3", "features.9")),
    ("torchvision:densenet121", {}, 32, ()),
    ("concat", {}, 4, ()),
]


@pytest.mark.parametrize(("name", "kwargs", "size", "dropped"), MODELS)
def test_two_steps_equal_one(
    name: str, kwargs: dict[str, Any], size: int, dropped: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    model = Concat() if name == "concat" else build_model(name, num_classes=10, kwargs=kwargs)
    model.eval()
    images = torch.randn(2, 3, size, size)
    plan = plan_pruning(model, images)
    assert plan.groups
    generator = torch.Generator().manual_seed(1)

    first = Recipe(dropped, _random_kept(plan.alive(dropped), generator))
    pruned = apply(copy.deepcopy(model), plan, first)
    own = restrict(pruned, plan, first)
    assert {group.name for group in own.groups} == set(first.kept)
    second = Recipe((), _random_kept(own.groups, generator))
    twice = apply(copy.deepcopy(pruned), own, second)

    both = compose(plan, first, second)
    once = apply(copy.deepcopy(model), plan, both)
    _assert_same(twice, once)
    with torch.no_grad():
        assert torch.equal(twice(images), once(images))

    again = restrict(twice, own, second)  # a third step on top
    assert {g.name: g.num_channels for g in again.groups} == {
        name: len(kept) for name, kept in both.kept.items()
    }
    _assert_plans_equal(again, restrict(once, plan, both))


def test_blocks_dropped_in_the_second_step() -> None:
    model = build_model("resnet20", num_classes=10, kwargs={}).eval()
    plan = plan_pruning(model, torch.randn(2, 3, 16, 16))
    generator = torch.Generator().manual_seed(0)
    first = Recipe(("layer1.2",), _random_kept(plan.alive(("layer1.2",)), generator))
    pruned = apply(copy.deepcopy(model), plan, first)
    own = restrict(pruned, plan, first)
    second = Recipe(("layer2.1",), _random_kept(own.alive(("layer2.1",)), generator))
    both = compose(plan, first, second)
    assert both.dropped_blocks == ("layer1.2", "layer2.1")
    _assert_same(apply(pruned, own, second), apply(copy.deepcopy(model), plan, both))
    assert "dropped block" in own.excluded["layer1.2.conv1"]


def test_compose_by_hand() -> None:
    model = build_model("resnet20", num_classes=10, kwargs={})
    plan = plan_pruning(model, torch.randn(2, 3, 16, 16))
    first = Recipe((), {"layer1.0.conv1": (1, 4, 5, 9)})
    second = Recipe(("layer1.1",), {"layer1.0.conv1": (0, 3), "layer1.2.conv1": (2, 15)})
    assert compose(plan, first, second) == Recipe(
        ("layer1.1",), {"layer1.0.conv1": (1, 9), "layer1.2.conv1": (2, 15)}
    )
    with pytest.raises(ValueError, match="`second.kept` .* must hold channels that the first"):
        compose(plan, first, Recipe((), {"layer1.0.conv1": (0, 4)}))
    with pytest.raises(ValueError, match="`second.kept`"):
        compose(plan, first, Recipe((), {"nothing": (0,)}))


def test_the_wrong_model_is_refused() -> None:
    model = build_model("resnet20", num_classes=10, kwargs={})
    plan = plan_pruning(model, torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match="layer1.0.conv1 has 16 channels.*2 should be left"):
        restrict(model, plan, Recipe((), {"layer1.0.conv1": (0, 1)}))


def test_no_data_knows_shapes_only() -> None:
    task = NoData((1, 8, 8), num_classes=3)
    assert torch.equal(task.example_input(2), torch.zeros(2, 1, 8, 8))
    assert task.num_classes == 3
    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    for call in (
        task.calibration_batches,
        task.train_batches,
        lambda: task.batches("val"),
        lambda: task.evaluate(nn.Identity()),
        lambda: task.loss(logits, labels),
    ):
        with pytest.raises(ValueError, match=r"`data` \(=none\) must be a data set"):
            call()
    with pytest.raises(ValueError, match="`input_shape`"):
        NoData((3, 0, 8))
    with pytest.raises(ValueError, match="`num_classes`"):
        NoData(num_classes=0)


def _random_kept(
    groups: tuple[Any, ...], generator: torch.Generator
) -> dict[str, tuple[int, ...]]:
    kept = {}
    for group in groups:
        size = group.num_channels // group.parts
        count = max(1, int(size * 0.7))
        columns = torch.randperm(size, generator=generator)[:count].sort().values.tolist()
        kept[group.name] = tuple(p * size + i for p in range(group.parts) for i in columns)
    return kept


def _assert_same(one: nn.Module, other: nn.Module) -> None:
    state = other.state_dict()
    assert one.state_dict().keys() == state.keys()
    for key, value in one.state_dict().items():
        assert torch.equal(value, state[key]), key


def _assert_plans_equal(one: PruningPlan, other: PruningPlan) -> None:
    for a, b in zip(one.groups, other.groups, strict=True):
        assert (a.name, a.num_channels, a.layers, a.parts) == (
            b.name,
            b.num_channels,
            b.layers,
            b.parts,
        )
        for x, y in zip(a.edits, b.edits, strict=True):
            assert (x.target, x.prune) == (y.target, y.prune)
            assert torch.equal(x.local, y.local) and torch.equal(x.root, y.root)
