"""Surgery is exact: pruned equals dense with the removed channels masked; replay is bit-equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.models.build import build_model
from prunesearch.methods.models.resnet_cifar import ZeroPadShortcut
from prunesearch.methods.shapes import changed_attributes, rebuild
from prunesearch.methods.surgery import (
    PruningPlan,
    Recipe,
    apply,
    group_scores,
    layer_widths,
)

ZOO: list[tuple[str, dict[str, Any], int]] = [
    ("resnet20", {"shortcut": "A"}, 32),
    ("resnet20", {"shortcut": "B"}, 32),
    ("resnet56", {"shortcut": "A"}, 32),
    ("resnet110", {"shortcut": "B"}, 32),
    ("resnet50_cifar", {}, 32),
    ("vgg16_cifar", {}, 32),
    ("torchvision:resnet18", {}, 64),
    ("torchvision:mobilenet_v2", {}, 64),
    ("torchvision:mobilenet_v3_small", {}, 64),
    ("torchvision:efficientnet_b0", {}, 64),
    ("torchvision:regnet_y_400mf", {}, 64),
    ("torchvision:densenet121", {}, 64),
    ("torchvision:googlenet", {}, 64),
    ("torchvision:resnext50_32x4d", {}, 64),
]
IDS = [f"{name}-{kwargs.get('shortcut', '')}" for name, kwargs, _ in ZOO]


@pytest.mark.parametrize(("name", "kwargs", "size"), ZOO, ids=IDS)
def test_pruned_equals_masked_and_replays(name: str, kwargs: dict[str, Any], size: int) -> None:
    model = _with_random_statistics(build_model(name, num_classes=10, kwargs=kwargs))
    images = torch.randn(2, 3, size, size, generator=_generator())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = plan_pruning(model, images)
    recipe = _random_recipe(plan)
    pruned = apply(copy.deepcopy(model), plan, recipe)
    widths = layer_widths(pruned)
    for group in plan.groups:
        assert widths[group.name] == len(recipe.kept[group.name])
    with torch.no_grad():
        expected = _masked(model, plan, recipe)(images)
        torch.testing.assert_close(
            pruned(images), expected, rtol=0, atol=2e-6 * float(expected.abs().max())
        )
        replayed = apply(copy.deepcopy(model), plan, Recipe.from_json(recipe.to_json()))
        assert torch.equal(replayed(images), pruned(images))
        fresh = build_model(name, num_classes=10, kwargs=kwargs)
        rebuilt = rebuild(fresh, (), changed_attributes(model, pruned), pruned.state_dict())
        assert torch.equal(rebuilt(images), pruned(images))
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_blocks_and_channels_together(shortcut: str) -> None:
    kwargs = {"shortcut": shortcut}
    model = _with_random_statistics(build_model("resnet20", num_classes=10, kwargs=kwargs))
    images = torch.randn(2, 3, 16, 16, generator=_generator())
    plan = plan_pruning(model, images)
    dropped = ("layer1.1", "layer3.2")
    names = {group.name for group in plan.alive(dropped)}
    assert "layer1.1.conv1" not in names
    assert "layer1.0.conv1" in names
    chosen = _random_recipe(plan)
    recipe = Recipe(dropped, {n: kept for n, kept in chosen.kept.items() if n in names})
    pruned = apply(copy.deepcopy(model), plan, recipe)
    masked = _masked(model, plan, recipe)
    for name in dropped:
        parent, _, leaf = name.rpartition(".")
        setattr(masked.get_submodule(parent), leaf, nn.Identity())
    with torch.no_grad():
        torch.testing.assert_close(pruned(images), masked(images), rtol=0, atol=1e-5)
        fresh = build_model("resnet20", num_classes=10, kwargs=kwargs)
        attributes = changed_attributes(model, pruned)
        rebuilt = rebuild(fresh, dropped, attributes, pruned.state_dict())
        assert torch.equal(rebuilt(images), pruned(images))


def test_pruned_model_trains() -> None:
    model = build_model("resnet20", num_classes=10, kwargs={"shortcut": "A"})
    images = torch.randn(4, 3, 16, 16, generator=_generator())
    plan = plan_pruning(model, images)
    pruned = apply(copy.deepcopy(model), plan, _random_recipe(plan)).train()
    pruned(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in pruned.parameters())


def test_scope_internal_leaves_residual_streams_alone() -> None:
    model = build_model("resnet20", num_classes=10, kwargs={})
    plan = plan_pruning(model, torch.randn(2, 3, 16, 16), scope="internal")
    assert [group.name for group in plan.groups] == [
        f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in (0, 1, 2)
    ]
    assert "residual add" in plan.excluded["conv1"]


def test_stages_follow_the_resolution() -> None:
    model = build_model("resnet20", num_classes=10, kwargs={})
    plan = plan_pruning(model, torch.randn(2, 3, 32, 32))
    stages = {group.name: group.stage for group in plan.groups}
    assert stages["conv1"] == stages["layer1.2.conv1"] == "stage1"
    assert stages["layer2.0.conv1"] == "stage2"
    assert stages["layer3.1.conv1"] == "stage3"
    assert plan.excluded == {"fc": "makes the model's output"}


def test_nothing_removed_is_the_dense_model() -> None:
    model = build_model("vgg16_cifar", num_classes=10, kwargs={})
    images = torch.randn(2, 3, 32, 32, generator=_generator())
    plan = plan_pruning(model, images)
    everything = {g.name: tuple(range(g.num_channels)) for g in plan.groups}
    same = apply(copy.deepcopy(model), plan, Recipe((), everything))
    with torch.no_grad():
        assert torch.equal(same(images), model(images))


def test_frozen_model_can_be_planned() -> None:
    model = build_model("resnet20", num_classes=10, kwargs={}).requires_grad_(False)
    assert len(plan_pruning(model, torch.randn(2, 3, 16, 16)).groups) == 12
    assert not any(p.requires_grad for p in model.parameters())


def test_group_scores_average_the_coupled_layers() -> None:
    model = build_model("resnet20", num_classes=10, kwargs={})
    plan = plan_pruning(model, torch.randn(2, 3, 16, 16))
    stream = plan["conv1"]
    assert stream.layers == ("conv1", "layer1.0.conv2", "layer1.1.conv2", "layer1.2.conv2")
    scores = {layer: torch.arange(16.0) * (index + 1) for index, layer in enumerate(stream.layers)}
    assert torch.equal(group_scores(stream, scores), torch.arange(16.0).double() * 2.5)
    without = group_scores(stream, scores, dropped=["layer1.2"])
    assert torch.equal(without, torch.arange(16.0).double() * 2.0)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"nowhere": (0,)}, "must name a channel group"),
        ({"conv1": ()}, "must hold 1 to 16 indices"),
        ({"conv1": (3, 16)}, "must hold 1 to 16 indices"),
    ],
)
def test_wrong_recipes_are_refused(kept: dict[str, tuple[int, ...]], message: str) -> None:
    model = build_model("resnet20", num_classes=10, kwargs={})
    plan = plan_pruning(model, torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match=message):
        apply(copy.deepcopy(model), plan, Recipe((), kept))


def test_grouped_convolutions_keep_whole_columns() -> None:
    model = build_model("torchvision:resnext50_32x4d", num_classes=10, kwargs={})
    plan = plan_pruning(model, torch.randn(2, 3, 64, 64))
    group = plan["layer1.0.conv1"]
    assert group.parts == 32
    with pytest.raises(ValueError, match="convolution groups"):
        apply(model, plan, Recipe((), {group.name: (0, 1, 2)}))


def test_unprunable_group_is_reported_not_broken() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.fc = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x = self.b(x.reshape(x.shape[0], 8, -1, 1))  # the width is written into the code
            return self.fc(x.mean((2, 3)))

    plan = plan_pruning(Fixed().eval(), torch.randn(2, 3, 7, 7))
    assert [group.name for group in plan.groups] == ["b"]
    assert "breaks" in plan.excluded["a"]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _with_random_statistics(model: nn.Module) -> nn.Module:
    generator = _generator()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.1, generator=generator)
    return model.eval()


def _random_recipe(plan: PruningPlan) -> Recipe:
    generator = _generator()
    kept = {}
    for group in plan.groups:
        size = group.num_channels // group.parts
        columns = torch.randperm(size, generator=generator)[: max(1, int(0.6 * size))]
        columns = columns.sort().values
        kept[group.name] = tuple(
            part * size + int(column) for part in range(group.parts) for column in columns
        )
    return Recipe((), kept)


def _masked(model: nn.Module, plan: PruningPlan, recipe: Recipe) -> nn.Module:
    """The dense model with the outputs of removed channels multiplied by zero."""
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    masked_types = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, ZeroPadShortcut)

    def masking(indices: Tensor) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, indices] = 0
            return output

        return hook

    for name, kept in recipe.kept.items():
        removed = torch.ones(plan[name].num_channels, dtype=torch.bool)
        removed[list(kept)] = False
        for edit in plan[name].edits:
            module = modules[edit.target]
            if isinstance(module, masked_types) and edit.prune.__name__ == "prune_out_channels":
                module.register_forward_hook(masking(edit.local[removed[edit.root]]))
    return model


class _Shuffled(nn.Module):
    """A channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1), nn.Linear(8, 10)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(self.b(x).mean((2, 3)))


class _GroupNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 32, 1), nn.GroupNorm(8, 32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.a(x)).mean((2, 3)))


class _ConcatGrouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 12, 1)
        self.c, self.fc = nn.Conv2d(24, 24, 1, groups=4), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c(torch.cat([self.a(x), self.b(x)], 1)).mean((2, 3)))


def test_shuffled_channels_keep_whole_columns() -> None:
    torch.manual_seed(0)
    plan = plan_pruning(_Shuffled().eval(), torch.randn(2, 3, 6, 6))
    assert {group.name: group.parts for group in plan.groups} == {"a": 2, "b": 1}
    assert "does not reach" in plan.excluded["unused"]


def test_group_norm_keeps_whole_columns() -> None:
    torch.manual_seed(0)
    model = _GroupNormed().eval()
    plan = plan_pruning(model, torch.randn(2, 3, 6, 6))
    assert plan["a"].parts == 8
    kept = tuple(i for i in range(32) if i % 4 != 1)
    pruned = apply(model, plan, Recipe((), {"a": kept}))
    assert pruned(torch.randn(2, 3, 6, 6)).shape == (2, 10)


def test_grouped_convolution_behind_a_concatenation_is_left_alone() -> None:
    torch.manual_seed(0)
    plan = plan_pruning(_ConcatGrouped().eval(), torch.randn(2, 3, 6, 6))
    assert {"a", "b"} <= plan.excluded.keys()
    assert "shares c" in plan.excluded["a"]


def test_internal_means_no_residual_add() -> None:
    model = build_model("torchvision:mobilenet_v3_small", num_classes=10, kwargs={})
    plan = plan_pruning(model, torch.randn(2, 3, 64, 64))
    assert plan["features.4.block.0.0"].internal  # coupled with its squeeze-excite gate only
    assert len(plan["features.4.block.0.0"].layers) > 1
    assert not plan["features.4.block.3.0"].internal
