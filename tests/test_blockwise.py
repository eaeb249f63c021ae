"""Block-wise pruning reaches the widths, learns what it lost, and touches nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunesearch.methods.block_widths import inner_groups, step_widths, widths_for_ratio
from prunesearch.methods.blockwise import block_features, prune_blockwise
from prunesearch.methods.criteria import score_channels
from prunesearch.methods.data.image_data import ImageData, Split
from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.measure import count_macs
from prunesearch.methods.models.build import build_model
from prunesearch.methods.models.resnet_cifar import BasicBlock, Bottleneck, CifarResNet
from prunesearch.methods.restrict import restrict
from prunesearch.methods.surgery import PruningPlan, Recipe, apply, layer_widths
from prunesearch.methods.tasks.classification import ClassificationTask
from prunesearch.methods.tasks.no_data import NoData

TASK = NoData((3, 8, 8), num_classes=4)
SCORES: dict[str, Any] = {"num_images": 2, "n_perturbations": 2}
CHEAP: dict[str, Any] = {"num_vectors": 32, "epochs": 4, "options": SCORES}
WIDTHS = {"layer1.0.conv1": 3, "layer2.0.conv1": 5, "layer3.1.conv1": 60}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet20", num_classes=4, kwargs={}).eval()


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> PruningPlan:
    return plan_pruning(model, torch.randn(2, 3, 8, 8), scope="internal")


def test_widths_reached_without_data(model: nn.Module, plan: PruningPlan) -> None:
    model.train()
    model.conv1.weight.requires_grad_(False)  # type: ignore[union-attr]
    before = copy.deepcopy(model.state_dict())
    seen: list[tuple[int, str]] = []
    pruned, recipe = _prune(model, plan, WIDTHS, on_block=lambda *at: seen.append(at))
    widths = layer_widths(pruned)
    for name, dense in layer_widths(model).items():
        assert widths[name] == WIDTHS.get(name, dense)
    assert {name: len(kept) for name, kept in recipe.kept.items()} == WIDTHS
    assert seen == [(1, "layer1.0"), (1, "layer2.0"), (1, "layer3.1")]
    assert not pruned.training
    frozen = {name for name, p in pruned.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1.weight"}
    assert all(p.grad is None for p in pruned.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pruned.modules())
    restrict(pruned, plan, recipe)  # fits

    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.eval().requires_grad_(True)


def test_only_pruned_blocks_change(model: nn.Module, plan: PruningPlan) -> None:
    pruned, recipe = _prune(model, plan, WIDTHS)
    surgery_only = apply(copy.deepcopy(model), plan, recipe).state_dict()
    blocks = ("layer1.0.", "layer2.0.", "layer3.1.")
    changed = {k for k, v in pruned.state_dict().items() if not torch.equal(v, surgery_only[k])}
    assert changed
    assert all(key.startswith(blocks) for key in changed)
    assert not any("running" in key for key in changed)


def test_reconstruction_lowers_the_error(model: nn.Module, plan: PruningPlan) -> None:
    widths = {"layer1.1.conv1": 6, "layer2.1.conv1": 12}
    options = CHEAP | {"num_vectors": 128, "epochs": 8}
    pruned, recipe = _prune(model, plan, widths, **options)
    plain = apply(copy.deepcopy(model), plan, recipe)
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(99))
    for block in ("layer1.1", "layer2.1"):
        _, dense = block_features(model, block, images)
        errors = [
            float((block_features(m, block, images)[1] - dense).square().mean())
            for m in (pruned, plain)
        ]
        assert errors[0] < 0.7 * errors[1], (block, errors)


def test_first_choice_is_the_criterion_s(model: nn.Module, plan: PruningPlan) -> None:
    layers, options = ["layer2.1.conv1"], SCORES | {"norm": "none"}
    _, recipe = _prune(model, plan, {layers[0]: 10}, epochs=0, options=options)
    seed = int(torch.randint(2**31, (1,), generator=torch.Generator().manual_seed(0)))
    scores = score_channels("blockwipg", model, TASK, layers, seed=seed, options=options)
    best = tuple(scores[layers[0]].topk(10).indices.sort().values.tolist())
    assert recipe.kept[layers[0]] == best
    _, recipe = _prune(
        model, plan, {layers[0]: 10}, epochs=0, criterion="magnitude_l1", options={}
    )
    norms = model.get_submodule(layers[0]).weight.abs().flatten(1).sum(1)
    assert recipe.kept[layers[0]] == tuple(norms.topk(10).indices.sort().values.tolist())


def test_steps_and_seeds(model: nn.Module, plan: PruningPlan) -> None:
    widths = {"layer1.0.conv1": 4, "layer3.2.conv1": 20}
    seen: list[int] = []
    one, first = _prune(model, plan, widths)
    three, later = _prune(
        model, plan, widths, steps=3, on_block=lambda step, block: seen.append(step)
    )
    assert seen == [1, 1, 2, 2, 3, 3]
    assert {n: w for n, w in layer_widths(three).items() if n in widths} == widths
    assert not _same(one, three)
    again, repeated = _prune(model, plan, widths, steps=3)
    assert repeated == later and _same(three, again)
    other, _ = _prune(model, plan, widths, steps=3, seed=1)
    assert not _same(three, other)
    taught, _ = _prune(model, plan, widths, steps=3, student_input="teacher")
    assert not _same(three, taught)


def test_labels_add_their_loss(model: nn.Module, plan: PruningPlan) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (96, 3, 8, 8), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(96) % 4)
    data = ImageData(
        name="noise",
        classes=("a", "b", "c", "d"),
        mean=(0.5,) * 3,
        std=(0.3,) * 3,
        train=split,
        val=split,
        test=split,
        crop_padding=0,
        horizontal_flip=False,
        official_test=False,
    )
    task = ClassificationTask(data, batch_size=32, calibration_size=16)
    widths = {"layer3.2.conv1": 16}
    options: dict[str, Any] = {"task": task, "num_vectors": 96}
    plain, recipe = _prune(model, plan, widths, **options)
    tuned, same = _prune(model, plan, widths, finetune_with_labels=True, **options)
    assert recipe == same
    assert task.evaluate(tuned, "train")["loss"] < task.evaluate(plain, "train")["loss"]
    outside = {k: v for k, v in plain.state_dict().items() if not k.startswith("layer3.2.")}
    assert all(torch.equal(tuned.state_dict()[key], value) for key, value in outside.items())
    with pytest.raises(ValueError, match=r"`data` \(=none\) must be a data set"):
        _prune(model, plan, widths, finetune_with_labels=True)


def test_pruned_and_dropped_model_as_the_start(model: nn.Module, plan: PruningPlan) -> None:
    start = Recipe(("layer1.1",), {"layer2.1.conv1": tuple(range(20))})
    smaller = apply(copy.deepcopy(model), plan, start)
    own = restrict(smaller, plan, start)
    pruned, _ = _prune(smaller, own, {"layer2.1.conv1": 7})
    assert layer_widths(pruned)["layer2.1.conv1"] == 7
    assert isinstance(pruned.get_submodule("layer1.1"), nn.Identity)


def test_depthwise_groups() -> None:
    model = build_model("torchvision:mobilenet_v2", num_classes=4, kwargs={}).eval()
    plan = plan_pruning(model, torch.randn(2, 3, 32, 32), scope="internal")
    name = "features.3.conv.0.0"
    task = NoData((3, 32, 32), num_classes=4)
    pruned, _ = _prune(model, plan, {name: 50}, steps=2, ratio_target="macs", task=task)
    widths = layer_widths(pruned)
    assert widths[name] == widths["features.3.conv.1.0"] == 50
    assert pruned(torch.randn(1, 3, 32, 32)).shape == (1, 4)


@pytest.mark.parametrize(
    ("widths", "options", "message"),
    [
        ({"conv1": 4}, {}, "crosses a residual add"),
        ({"layer1.0.conv7": 4}, {}, "`widths` .*Did you mean `layer1.0.conv1`"),
        ({"layer1.0.conv1": 17}, {}, "`widths.layer1.0.conv1` .=17. must be from 1 to 16"),
        ({"layer1.0.conv1": 0}, {}, "must be from 1 to 16"),
        ({"layer1.0.conv1": 4}, {"steps": 0}, "`steps` .=0. must be at least 1"),
        ({"layer1.0.conv1": 4}, {"options": {"sigma": -1.0}}, "`blockwipg.sigma`"),
        ({"layer1.0.conv1": 4}, {"options": {"sgima": 0.1}}, "Did you mean `sigma`"),
    ],
)
def test_errors(
    model: nn.Module, widths: dict[str, int], options: dict[str, Any], message: str
) -> None:
    everything = plan_pruning(model, torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match=message):
        _prune(model, everything, widths, **options)


def test_groups_beyond_every_block_are_refused() -> None:
    model = build_model("vgg16_cifar", num_classes=4, kwargs={}).eval()
    plan = plan_pruning(model, torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="`widths` .=features.40. .* reaches beyond every block"):
        _prune(model, plan, {"features.40": 100})
    inside = inner_groups(model, [plan["features.0"]], TASK.example_input(1))
    assert list(inside) == ["features"]


@pytest.mark.parametrize("target", ["channels", "params", "macs"])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_ratio_counts_what_it_says(block: Any, target: Any) -> None:
    model = CifarResNet(
        block, [2, 2], [64, 128], num_classes=4, in_channels=3, shortcut="B"
    ).eval()
    images = torch.randn(2, 3, 8, 8)
    plan = plan_pruning(model, images, scope="internal")
    widths = widths_for_ratio(model, plan, images, 0.3, ratio_target=target)
    pruned = apply(
        copy.deepcopy(model), plan, Recipe((), {n: tuple(range(w)) for n, w in widths.items()})
    )
    for name, groups in inner_groups(model, plan.groups, images).items():
        _, dense = block_features(model, name, images)
        given, _ = block_features(model, name, images)
        counts = []
        for each in (model.get_submodule(name), pruned.get_submodule(name)):
            counts.append(
                {
                    "channels": sum(layer_widths(each)[g.name[len(name) + 1 :]] for g in groups),
                    "params": sum(p.numel() for p in each.parameters() if p.ndim > 1),
                    "macs": count_macs(each, given),
                }[target]
            )
        assert 1 - counts[1] / counts[0] == pytest.approx(0.3, abs=0.01)


def test_steps_remove_equal_shares() -> None:
    model = CifarResNet(Bottleneck, [1], [64], num_classes=4, in_channels=3, shortcut="B").eval()
    images = torch.randn(2, 3, 8, 8)
    plan = plan_pruning(model, images, scope="internal")
    blocks = inner_groups(model, plan.groups, images)
    first, second = "layer1.0.conv1", "layer1.0.conv2"
    last = {first: 32, second: 32}
    by_channels = step_widths(model, blocks, last, images, 4, "channels")
    assert by_channels == [{first: w, second: w} for w in (56, 48, 40, 32)]
    by_params = step_widths(model, blocks, last, images, 4, "params")
    # conv1 64 x w, conv2 9 w x w, conv3 256 w, shortcut 64 x 256
    sizes = [64 * w + 9 * w * w + 256 * w for w in (64, *(w[first] for w in by_params))]
    removed = [(sizes[0] - size) / (sizes[0] - sizes[-1]) for size in sizes[1:]]
    assert removed == pytest.approx([0.25, 0.5, 0.75, 1], abs=0.02)
    assert by_params[0][first] > 56
    assert by_params[-1] == last


def test_a_ratio_that_cannot_be_reached(model: nn.Module, plan: PruningPlan) -> None:
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="`ratio` .=0.99. must be at most"):
        widths_for_ratio(model, plan, images, 0.99, ratio_target="params")
    with pytest.raises(ValueError, match=r"`ratio` .=1. must be in \[0, 1\)"):
        widths_for_ratio(model, plan, images, 1)
    nothing = widths_for_ratio(model, plan, images, 0)
    assert nothing == {group.name: group.num_channels for group in plan.groups}


def _prune(
    model: nn.Module,
    plan: PruningPlan,
    widths: dict[str, int],
    *,
    task: Any = TASK,
    seed: int = 0,
    **options: Any,
) -> tuple[nn.Module, Recipe]:
    generator = torch.Generator().manual_seed(seed)
    return prune_blockwise(model, plan, task, widths, generator=generator, **(CHEAP | options))


def _same(one: nn.Module, other: nn.Module) -> bool:
    states: list[dict[str, Tensor]] = [one.state_dict(), other.state_dict()]
    return all(torch.equal(value, states[1][key]) for key, value in states[0].items())
