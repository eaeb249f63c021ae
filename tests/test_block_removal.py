"""Rankings measured behind each removed block equal those measured with whole models, exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import pytest
import torch
from captum.attr import LayerGradientXActivation
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunesearch.methods import replay
from prunesearch.methods.block_orders import REDRAW
from prunesearch.methods.block_removal import BlockRanking, Order, exhaustive, rank_blocks
from prunesearch.methods.blocks import removable_blocks, remove_blocks
from prunesearch.methods.data import load_data
from prunesearch.methods.finetune import finetune, recalibrate_batch_norm
from prunesearch.methods.models.build import build_model
from prunesearch.methods.tasks import ClassificationTask
from prunesearch.methods.tasks.meter import ClassificationMeter
from prunesearch.search.bench.blocks import bench_blocks, blocks_table


@pytest.fixture(scope="module")
def task() -> ClassificationTask:
    data = load_data("digits", image_size=16)
    return ClassificationTask(data, batch_size=32, calibration_size=72)


@pytest.fixture(scope="module")
def resnet20() -> nn.Module:
    return make_model("resnet20")


def make_model(name: str) -> nn.Module:
    """A model whose batch norms are random, so that every block matters."""
    torch.manual_seed(0)
    model = build_model(name, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def both(model: nn.Module, task: Any, blocks: Sequence[str], **options: Any) -> BlockRanking:
    """Ranks both ways; they must agree in every digit."""
    suffix = rank_blocks(model, task, blocks, **options)
    whole = rank_blocks(model, task, blocks, suffix_only=False, **options)
    assert suffix.suffix_only and not whole.suffix_only
    assert (suffix.order, suffix.path) == (whole.order, whole.path)
    assert suffix.evaluations == whole.evaluations
    return suffix


@pytest.mark.parametrize("score", ["accuracy", "loss"])
def test_greedy_equals_removing_for_real(
    resnet20: nn.Module, task: ClassificationTask, score: str
) -> None:
    blocks = removable_blocks(resnet20, task.example_input())
    ranking = both(resnet20, task, blocks, order="greedy", score=score)
    assert sorted(ranking.order) == sorted(blocks)
    assert ranking.evaluations == 6 + 5 + 4 + 3 + 2 + 1
    removed: tuple[str, ...] = ()
    for step in ranking.path:
        measured = {b: evaluated(resnet20, task, (*removed, b)) for b in set(blocks) - {*removed}}
        sign = 1 if score == "accuracy" else -1
        best = max(sign * value[score] for value in measured.values())
        ties = [b for b, value in measured.items() if sign * value[score] == best]
        removed = (*removed, max(ties))  # here the later block has the greater name
        assert step.removed == removed
        assert step.accuracy == measured[removed[-1]]["accuracy"]
        assert step.loss == pytest.approx(measured[removed[-1]]["loss"], rel=1e-6)
    assert ranking.order == removed


def test_oneshot_equals_removing_for_real(resnet20: nn.Module, task: ClassificationTask) -> None:
    blocks = removable_blocks(resnet20, task.example_input(), valid="residual")
    ranking = both(resnet20, task, blocks, order="oneshot")
    assert len({step.loss for step in ranking.path}) == ranking.evaluations == 7
    for name, step in zip(ranking.order, ranking.path, strict=True):
        assert step.removed == (name,)
        assert step.accuracy == evaluated(resnet20, task, [name])["accuracy"]
    accuracies = [step.accuracy for step in ranking.path]
    assert accuracies == sorted(accuracies, reverse=True)


@pytest.mark.parametrize(
    "name",
    ["torchvision:resnet18", "torchvision:mobilenet_v2", "torchvision:swin_t"],
)
def test_other_architectures(name: str) -> None:
    model, task = make_model(name), SmallTask(size=32, count=3)
    blocks = removable_blocks(model, task.images[:1], valid="residual")
    both(model, task, blocks, order="oneshot", score="loss")


def test_exhaustive_measures_all_64_subsets(resnet20: nn.Module, task: ClassificationTask) -> None:
    blocks = removable_blocks(resnet20, task.example_input())
    found = exhaustive(resnet20, task, blocks)
    assert found == exhaustive(resnet20, task, blocks, suffix_only=False)
    assert len(found) == len({frozenset(subset) for subset in found}) == 64
    for subset in [(), tuple(blocks), ("layer1.2", "layer2.1", "layer3.2")]:
        assert found[subset] == evaluated(resnet20, task, subset)["accuracy"]


def test_half_the_work_is_saved() -> None:
    model, task = make_model("resnet56"), SmallTask(size=8)
    blocks = removable_blocks(model, task.images[:1])

    def flops(suffix_only: bool) -> int:
        with FlopCounterMode(display=False) as counter:
            rank_blocks(model, task, blocks, order="oneshot", suffix_only=suffix_only)
        return counter.get_total_flops()

    small = SmallTask(size=8, count=2)  # what it costs to look at the model on two images
    with FlopCounterMode(display=False) as setup:
        rank_blocks(model, small, blocks, order="random")
    assert flops(False) - setup.get_total_flops() > 1.8 * (flops(True) - setup.get_total_flops())


def test_the_benchmark_compares_both_ways() -> None:
    result = bench_blocks(model="resnet20", images=8, rounds=1)
    assert [row["equal"] for row in result["rows"]] == [True, True]
    assert [row["evaluations"] for row in result["rows"]] == [6, 6 + 5 + 4]
    table = blocks_table(result)
    assert table.row_count == 2
    assert "ratio (range)" in [column.header for column in table.columns]


class InPlace(nn.Module):
    """Activations are overwritten after their module has returned; a ReLU is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.side = nn.Conv2d(6, 6, 1)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.ModuleList(PreActivation(6) for _ in range(4))
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        x = self.stem(x)
        skip = self.side(x)
        x += skip
        x = self.relu(x)
        for block in self.blocks:
            x = block(x)
        x += skip
        return self.head(self.relu(x).mean((2, 3)))


class PreActivation(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(torch.relu_(self.norm(x)))
        out += x
        return out


class Fragile(nn.Module):
    """The same tensor under two names, one of which a module overwrites: no replay is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.ModuleList(PreActivation(6) for _ in range(3))
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        skip = x = self.stem(x)
        x = self.relu(x)  # skip too
        for block in self.blocks:
            x = block(x)
        return self.head((x * skip).mean((2, 3)))


class SmallTask:
    def __init__(self, size: int, count: int = 6) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 3, size, size, generator=generator)
        self.labels = torch.randint(0, 10, (count,), generator=generator)

    def calibration_batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.images.split(4), self.labels.split(4), strict=True))

    def training_loss(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(images), target)

    def meter(self) -> ClassificationMeter:
        return ClassificationMeter()


BLOCKS = [f"blocks.{i}" for i in range(4)]


def test_operations_in_place_do_not_leak_into_the_next_run() -> None:
    torch.manual_seed(0)
    model, task = InPlace().eval(), SmallTask(size=8)
    images = task.images.clone()
    ranking = both(model, task, BLOCKS, score="loss")
    assert len({step.loss for step in ranking.path}) == 4
    assert exhaustive(model, task, BLOCKS) == exhaustive(model, task, BLOCKS, suffix_only=False)
    assert torch.equal(task.images, images)


def test_a_model_that_cannot_be_replayed_is_run_whole() -> None:
    torch.manual_seed(0)
    model, task = Fragile().eval(), SmallTask(size=8)
    ranking = rank_blocks(model, task, BLOCKS[:3], score="loss")
    whole = rank_blocks(model, task, BLOCKS[:3], score="loss", suffix_only=False)
    assert not ranking.suffix_only
    assert ranking.path == whole.path


def test_a_small_cache_splits_the_batches(
    resnet20: nn.Module, task: ClassificationTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = removable_blocks(resnet20, task.example_input())
    expected = rank_blocks(resnet20, task, blocks, order="oneshot")
    monkeypatch.setattr(replay, "MAX_CACHE_BYTES", 2**20)
    split = both(resnet20, task, blocks, order="oneshot")
    assert split.order == expected.order
    assert [step.accuracy for step in split.path] == [step.accuracy for step in expected.path]


@pytest.mark.parametrize(
    "run",
    [
        rank_blocks,
        exhaustive,
        partial(rank_blocks, order="sr_init"),
        partial(rank_blocks, order="attribution"),
        partial(rank_blocks, score_finetune_epochs=0.03, finetune_from="cumulative"),
    ],
)
def test_the_model_is_left_as_it_was(
    resnet20: nn.Module, task: ClassificationTask, run: Callable[..., Any]
) -> None:
    model = copy.deepcopy(resnet20).train()
    model.get_submodule("layer2").eval()
    attributes = [set(vars(module)) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    run(model, task, removable_blocks(model, task.example_input())[:3])
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(random_state, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for (key, value), (_, original) in zip(
        model.state_dict().items(), resnet20.state_dict().items(), strict=True
    ):
        assert torch.equal(value, original), key


def test_of_equal_blocks_the_later_goes_first(task: ClassificationTask) -> None:
    model = build_model("resnet20", num_classes=10)
    nn.init.zeros_(model.get_submodule("fc").weight)
    blocks = removable_blocks(model, task.example_input())
    for order in ("greedy", "oneshot", "sequential"):
        assert rank_blocks(model, task, blocks[::-1], order=order).order == tuple(blocks[::-1])


def test_orders_that_measure_nothing(resnet20: nn.Module, task: ClassificationTask) -> None:
    blocks = removable_blocks(resnet20, task.example_input())
    first, again, other = (
        rank_blocks(resnet20, task, blocks, order="random", seed=seed) for seed in (0, 0, 1)
    )
    assert first.order == again.order != other.order
    assert sorted(first.order) == sorted(other.order) == sorted(blocks)
    assert first.path == () and first.evaluations == 0


def test_max_drop_stops_measuring_and_still_orders_all(
    resnet20: nn.Module, task: ClassificationTask
) -> None:
    blocks = removable_blocks(resnet20, task.example_input())
    full = rank_blocks(resnet20, task, blocks)
    short = rank_blocks(resnet20, task, blocks, max_drop=2)
    assert short.path == full.path[:2] and short.order[:2] == full.order[:2]
    assert short.evaluations == 6 + 5
    assert sorted(short.order) == sorted(blocks)
    assert sorted(rank_blocks(resnet20, task, blocks, max_drop=0).order) == sorted(blocks)
    for order in get_args(Order):
        assert rank_blocks(resnet20, task, [], order=order).order == ()


def test_wrong_input_is_refused(resnet20: nn.Module, task: ClassificationTask) -> None:
    for options, message in [
        ({"blocks": ["layer1.9"]}, r"\(=layer1.9\).*Did you mean `layer1"),
        ({"score_finetune_epochs": -1}, r"\(=-1\) must be a finite number"),
        ({"score_finetune_epochs": 1, "order": "sequential"}, r"`order` \(=sequential\) must be"),
        ({"finetune_from": "originl"}, "Did you mean `original`"),
        ({"sr_samples": 0, "order": "sr_init"}, r"\(=0\) must be at least 1"),
        ({"order": "gready"}, "Did you mean `greedy`"),
        ({"score": "acuracy"}, "Did you mean `accuracy`"),
        ({"max_drop": -1}, r"\(=-1\) must be at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            rank_blocks(resnet20, task, **{"blocks": ["layer1.1"], **options})
    with pytest.raises(ValueError, match="must be called once"):
        rank_blocks(SharedBlock(), SmallTask(8), ["block"])
    with pytest.raises(ValueError, match=r"\(=13 names\) must hold at most 12"):
        exhaustive(resnet20, task, ["layer1.1"] * 13)


@pytest.mark.parametrize("score", ["accuracy", "loss"])
@pytest.mark.parametrize("constructed", [False, True])
def test_sr_init_equals_copying_the_state_by_hand(
    resnet20: nn.Module, task: ClassificationTask, score: str, constructed: bool
) -> None:
    blocks = removable_blocks(resnet20, task.example_input(), valid="residual")
    fresh = (lambda: build_model("resnet20", num_classes=10)) if constructed else None
    options = {"order": "sr_init", "score": score, "seed": 5, "sr_samples": 2, "fresh": fresh}
    ranking = both(resnet20, task, blocks, **options)
    assert ranking.evaluations == 2 * len(blocks) == 14
    measured: dict[str, list[dict[str, float]]] = {block: [] for block in blocks}
    for seed in (5 + REDRAW, 5 + 2 * REDRAW):
        torch.manual_seed(seed)
        other = fresh() if fresh else copy.deepcopy(resnet20)
        for block in blocks:
            if not fresh:
                for module in other.get_submodule(block).modules():
                    if hasattr(module, "reset_parameters"):
                        module.reset_parameters()
        for block in blocks:
            model = copy.deepcopy(resnet20)
            for key, value in model.state_dict().items():
                if key.startswith(f"{block}."):
                    value.copy_(other.state_dict()[key])
            norm = model.get_submodule(f"{block}.bn2")
            assert not norm.running_mean.any() and norm.running_var.eq(1).all()
            measured[block].append(task.evaluate(model, "calibration"))
    for step in ranking.path:
        first, second = measured[step.removed[0]]
        assert step.accuracy == (first["accuracy"] + second["accuracy"]) / 2
        assert step.loss == pytest.approx((first["loss"] + second["loss"]) / 2, rel=1e-6)
    values = [getattr(step, score) for step in ranking.path]
    assert values == sorted(values, reverse=score == "accuracy")
    assert ranking.order == tuple(step.removed[0] for step in ranking.path)
    assert score == "accuracy" or ranking.order != tuple(blocks[::-1])  # the accuracies tie
    again = rank_blocks(resnet20, task, blocks, **options)
    assert (again.order, again.path) == (ranking.order, ranking.path)
    assert rank_blocks(resnet20, task, blocks, **options | {"seed": 9}).path != ranking.path


def test_sr_init_refuses_weights_that_cannot_be_drawn_anew() -> None:
    torch.manual_seed(0)
    model, task = InPlace().eval(), SmallTask(size=8)
    model.blocks[1].scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"`blocks` \(=blocks.1\).*PreActivation.*Pass `fresh`"):
        rank_blocks(model, task, BLOCKS, order="sr_init")
    other = copy.deepcopy(model)
    assert len(rank_blocks(model, task, BLOCKS, order="sr_init", fresh=lambda: other).path) == 4


def test_attribution_equals_captum(resnet20: nn.Module, task: ClassificationTask) -> None:
    blocks = removable_blocks(resnet20, task.example_input(), valid="residual")
    ranking = rank_blocks(resnet20, task, blocks, order="attribution")
    model = copy.deepcopy(resnet20).eval()
    sums = dict.fromkeys(blocks, 0.0)
    for images, labels in task.calibration_batches():
        for block in blocks:
            captum = LayerGradientXActivation(
                lambda x, y: task.loss(model(x), y).view(1), model.get_submodule(block)
            )
            sums[block] += (
                captum.attribute(images, additional_forward_args=labels).abs().sum().item()
            )
    assert ranking.order == tuple(sorted(blocks, key=sums.__getitem__))
    assert ranking.order not in (tuple(blocks), tuple(blocks[::-1]))
    assert ranking.path == () and ranking.evaluations == 0


FINETUNE = {"score_finetune_epochs": 0.05, "finetune_lr": 0.02, "seed": 3, "score": "loss"}


def finetuned(model: nn.Module, task: ClassificationTask, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    finetune(model, task, epochs=0.05, lr=0.02, generator=generator)
    return model


@pytest.mark.parametrize("start", ["original", "cumulative"])
def test_greedy_measures_finetuned_models(
    resnet20: nn.Module, task: ClassificationTask, start: str
) -> None:
    blocks = ["layer2.1", "layer2.2", "layer3.1"]
    ranking = rank_blocks(resnet20, task, blocks, finetune_from=start, **FINETUNE)
    assert ranking.evaluations == 3 + 2 + 1 and not ranking.suffix_only
    kept: dict[tuple[str, ...], nn.Module] = {}
    removed: tuple[str, ...] = ()
    for index, step in enumerate(ranking.path):
        measured = {}
        for block in (b for b in blocks if b not in removed):
            origin = kept[removed] if start == "cumulative" and removed else resnet20
            model = copy.deepcopy(origin)
            names = [block] if start == "cumulative" else [*removed, block]
            kept[*removed, block] = finetuned(remove_blocks(model, names), task, 3 + index)
            measured[block] = task.evaluate(kept[*removed, block], "calibration")
        removed = (*removed, min(measured, key=lambda block: measured[block]["loss"]))
        assert step.removed == removed
        assert step.accuracy == measured[removed[-1]]["accuracy"]
        assert step.loss == pytest.approx(measured[removed[-1]]["loss"], rel=1e-6)


def test_finetuning_changes_what_is_measured(
    resnet20: nn.Module, task: ClassificationTask
) -> None:
    blocks = ["layer2.1", "layer2.2", "layer3.1"]
    plain = rank_blocks(resnet20, task, blocks, score="loss")
    original, cumulative, again = (
        rank_blocks(resnet20, task, blocks, finetune_from=start, **FINETUNE)
        for start in ("original", "cumulative", "cumulative")
    )
    assert original.path[0] == cumulative.path[0]  # the first removal starts from the same model
    assert original.path[1] != cumulative.path[1]
    assert cumulative.path == again.path
    assert original.path[0].loss < plain.path[0].loss
    oneshot = rank_blocks(resnet20, task, blocks, order="oneshot", **FINETUNE)
    assert oneshot.path[0] == original.path[0] and oneshot.evaluations == 3
    short = rank_blocks(resnet20, task, blocks, max_drop=1, **FINETUNE)
    assert short.order == oneshot.order and short.path == original.path[:1]


class SharedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x)).mean((2, 3))


def evaluated(
    model: nn.Module, task: ClassificationTask, blocks: Sequence[str]
) -> dict[str, float]:
    return task.evaluate(remove_blocks(copy.deepcopy(model), blocks), "calibration")


def test_recalibrated_scores_are_those_of_recalibrated_copies():
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10)
    data = load_data("digits", image_size=8, limit=300)
    task = ClassificationTask(data, batch_size=32, calibration_size=64)
    blocks = removable_blocks(model, task.example_input(2))[:3]
    finetune(model, task, epochs=2, lr=0.05, generator=torch.Generator().manual_seed(0))
    ranking = rank_blocks(
        model, task, blocks, order="exhaustive", score="loss", seed=3, score_recalibrate_bn=True
    )
    assert ranking.evaluations == 8 and not ranking.suffix_only
    plain = rank_blocks(model, task, blocks, order="exhaustive", score="loss")
    best = ranking.path[0]
    losses = {}
    for block in blocks:
        copied = remove_blocks(copy.deepcopy(model), [block])
        recalibrate_batch_norm(copied, task, generator=torch.Generator().manual_seed(3))
        losses[block] = task.evaluate(copied, "calibration")["loss"]
    assert best.loss == pytest.approx(min(losses.values()), rel=1e-5)
    assert best.removed == (min(losses, key=losses.__getitem__),)
    assert best.loss < plain.path[0].loss
    greedy = rank_blocks(model, task, blocks, score="loss", seed=3, score_recalibrate_bn=True)
    assert greedy.path[0] == best
    with pytest.raises(ValueError, match=r"`order` \(=random\) must be one of greedy, oneshot"):
        rank_blocks(model, task, blocks, order="random", score_recalibrate_bn=True)
