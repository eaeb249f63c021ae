"""Segmentation: loss, mIoU, augmentation, its models, and every method on them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_segmentation_data import write_camvid
from torch import Tensor, nn
from torch.nn import functional as F

from prunesearch.methods.block_removal import rank_blocks
from prunesearch.methods.blocks import removable_blocks, remove_blocks
from prunesearch.methods.blockwise import prune_blockwise
from prunesearch.methods.criteria import CRITERIA, score_channels
from prunesearch.methods.data import ImageData, Split
from prunesearch.methods.data.masks import IGNORED
from prunesearch.methods.finetune import finetune
from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.layer_attribution import score_layers
from prunesearch.methods.measure import count_macs, count_params
from prunesearch.methods.models.build import build_model
from prunesearch.methods.sparse_training import SPARSE_TRAINING
from prunesearch.methods.surgery import Recipe, group_norms, prune
from prunesearch.methods.tasks import SegmentationTask
from prunesearch.methods.tasks.segmentation import (
    SegmentationMeter,
    balanced_weights,
    scale_and_crop,
)

NUM_CLASSES = 4
SIZE = 32
NARROW = {
    "segnet": {"width": 4},
    "deeplabv3_cityscapes": {"width": 2, "depths": [2, 2, 2, 2]},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_data(counts: tuple[int, int, int] = (12, 4, 4), num_classes: int = 4) -> ImageData:
    """Quarters of one colour a class, with ignored borders."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        corners = torch.randint(0, num_classes, (count, 2, 2), generator=generator)
        masks = corners.repeat_interleave(SIZE // 2, 1).repeat_interleave(SIZE // 2, 2)
        noise = torch.randint(0, 30, (count, 3, SIZE, SIZE), generator=generator)
        colours = torch.tensor([[200, 20, 20], [20, 200, 20], [20, 20, 200], [150, 150, 20]])
        images = colours[masks].permute(0, 3, 1, 2) + noise
        masks[:, 0] = masks[:, :, 0] = IGNORED
        return Split(images.to(torch.uint8), masks.to(torch.uint8))

    return ImageData(
        name="camvid",
        classes=tuple("abcd"[:num_classes]),
        train=split(counts[0]),
        val=split(counts[1]),
        test=split(counts[2]),
        mean=(0.4, 0.4, 0.3),
        std=(0.3, 0.3, 0.3),
        crop_padding=0,
        horizontal_flip=True,
        official_test=True,
    )


def make_task(**options: Any) -> SegmentationTask:
    return SegmentationTask(make_data(), batch_size=4, calibration_size=4, **options)


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, num_classes=NUM_CLASSES, kwargs=NARROW[name])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- loss and metrics ------------------------------------------------------------------------


def random_batch(count: int = 3) -> tuple[Tensor, Tensor]:
    logits = torch.randn(count, NUM_CLASSES, 8, 9, generator=generator())
    targets = torch.randint(0, NUM_CLASSES, (count, 8, 9), generator=generator(1))
    targets[:, :2] = IGNORED
    return logits, targets


def test_loss_is_the_mean_over_pixels_that_have_a_class() -> None:
    logits, targets = random_batch()
    task = make_task()
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORED)
    torch.testing.assert_close(task.loss(logits, targets), expected)
    auxiliary = logits.flip(1)
    both = expected + 0.4 * F.cross_entropy(auxiliary, targets, ignore_index=IGNORED)
    torch.testing.assert_close(task.loss({"out": logits, "aux": auxiliary}, targets), both)
    torch.testing.assert_close(task.loss({"out": logits}, targets), expected)
    nothing = torch.full_like(targets, IGNORED)
    assert task.loss(logits, nothing) == 0
    weighted = make_task(class_weights="balanced")
    weights = balanced_weights(weighted.data.train.labels, NUM_CLASSES)
    expected = F.cross_entropy(logits, targets, weights, ignore_index=IGNORED)
    torch.testing.assert_close(weighted.loss(logits, targets), expected)


def test_miou_equals_counting_pixels() -> None:
    logits, targets = random_batch()
    targets[targets == 2] = 1  # class 2 is in no mask: it does not count, though it is predicted
    meter = SegmentationMeter(NUM_CLASSES)
    for one, target in zip(logits, targets, strict=True):
        meter.update({"out": one[None]}, target[None])
    found = meter.compute()
    predicted, true = logits.argmax(1)[targets != IGNORED], targets[targets != IGNORED]
    ious = [
        int(((predicted == c) & (true == c)).sum()) / int(((predicted == c) | (true == c)).sum())
        for c in (0, 1, 3)
    ]
    assert found["accuracy"] == pytest.approx(np.mean(ious))
    assert found["pixel_accuracy"] == pytest.approx((predicted == true).double().mean().item())
    assert found["loss"] == pytest.approx(
        F.cross_entropy(logits, targets, ignore_index=IGNORED).item(), rel=1e-5
    )


def test_median_frequency_balancing_by_hand() -> None:
    masks = torch.tensor([[[0, 0], [0, 1]], [[0, 0], [0, 0]], [[1, 1], [2, IGNORED]]])
    # Of the pixels of the images that have the class: 7/8 of class 0, 3/8 of 1, 1/4 of 2.
    frequency = torch.tensor([7 / 8, 3 / 8, 1 / 4])
    expected = torch.cat([(3 / 8) / frequency, torch.ones(1)])
    torch.testing.assert_close(balanced_weights(masks.to(torch.uint8), 4), expected)


# --- augmentation ----------------------------------------------------------------------------


def test_image_and_mask_move_together() -> None:
    rows = torch.arange(SIZE).view(1, 1, -1, 1).expand(8, 1, SIZE, SIZE)
    columns = torch.arange(SIZE).view(1, 1, 1, -1).expand(8, 1, SIZE, SIZE)
    images = torch.cat([rows, columns, torch.full_like(rows, 99)], 1).to(torch.uint8) + 1
    masks = images[:, 1] - 1  # the column
    pixels, labels = scale_and_crop(images, masks, generator(), max_scale=2.0, flip=True)
    assert pixels.shape == images.shape and labels.dtype == torch.uint8
    inside = labels != IGNORED
    assert 0.4 < inside.float().mean() < 1
    full = inside & (pixels[:, 2] > 99.99)  # not mixed with what lies outside
    assert (pixels[:, 1][full] - 1 - labels[full]).abs().max() <= 0.51
    mirrored = (pixels[:, 1, :, 20] < pixels[:, 1, :, 12]).float().mean(1) > 0.5
    assert 0 < mirrored.sum() < 8
    assert (pixels[:, 2][~inside] <= 50.5).all()  # what is black, and less than half mixed


def test_without_scaling_nothing_moves() -> None:
    data = make_data()
    images, masks = data.train.images, data.train.labels
    pixels, labels = scale_and_crop(images, masks, generator(), max_scale=1.0, flip=False)
    torch.testing.assert_close(pixels, images.float(), atol=1e-3, rtol=0)
    assert torch.equal(labels, masks)
    pixels, labels = scale_and_crop(images, masks, generator(), max_scale=1.0, flip=True)
    mirrored = ~(labels == masks).flatten(1).all(1)
    assert torch.equal(labels[mirrored], masks.flip(2)[mirrored])
    torch.testing.assert_close(
        pixels[mirrored], images.flip(3)[mirrored].float(), atol=1e-3, rtol=0
    )


# --- models ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num_classes", "shape", "num_params", "macs"),
    [
        ("segnet", 12, (360, 480), 29.450e6, 106.39e9),
        ("deeplabv3_cityscapes", 19, (1024, 2048), 46.000e6, None),
    ],
)
def test_published_counts(
    name: str, num_classes: int, shape: tuple[int, int], num_params: float, macs: float | None
) -> None:
    model = build_model(name, num_classes=num_classes).to("meta")
    assert count_params(model) == pytest.approx(num_params, rel=2e-5)
    counted = count_macs(model, torch.empty(1, 3, *shape, device="meta"))
    if macs is not None:
        assert counted == pytest.approx(macs, rel=1e-4)


@pytest.mark.parametrize("name", NARROW)
def test_models_train_and_answer_at_the_size_of_the_image(name: str) -> None:
    model, task = make_model(name), make_task(max_scale=1.0)
    for shape in ((33, 47), (64, 32)):  # odd sides too
        with torch.no_grad():
            logits = model(torch.randn(2, 3, *shape))
        assert logits.shape == (2, NUM_CLASSES, *shape)
    losses: list[float] = []
    finetune(
        model, task, epochs=12, lr=0.1, generator=generator(),
        on_epoch=lambda _, loss: losses.append(loss),
    )  # fmt: skip
    assert losses[-1] < 0.85 * losses[0]
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_auxiliary_head_only_trains() -> None:
    model, x = make_model("deeplabv3_cityscapes"), torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        alone = model(x)
    both = model(x)
    assert set(both) == {"out", "aux"} and both["aux"].shape == both["out"].shape
    torch.testing.assert_close(alone, both["out"].detach())
    smaller = copy.deepcopy(model)
    smaller.auxiliary = nn.Identity()
    assert count_macs(smaller, x) == count_macs(model, x)


@pytest.mark.parametrize("name", NARROW)
def test_an_exported_graph_gives_the_logits_alone(name: str) -> None:
    model, x = make_model(name).requires_grad_(False), torch.randn(2, 3, SIZE, SIZE)
    shapes = ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about its own code
        graph = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    x = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x))


# --- pruning ---------------------------------------------------------------------------------


def keep_some(model: nn.Module, x: Tensor) -> tuple[nn.Module, Any]:
    plan = plan_pruning(model, x)
    kept = {
        group.name: tuple(i for i in range(group.num_channels) if i % 2 == 0)
        for group in plan.groups
    }
    return prune(model, plan, Recipe((), kept)), plan


def test_unpooling_ties_encoder_and_decoder() -> None:
    model, x = make_model("segnet"), make_task().example_input(2)
    pruned, plan = keep_some(model, x)
    groups = [set(group.layers) for group in plan.groups]
    for encoder, decoder in (
        ("encoder.3.6", "decoder.0.6"),
        ("encoder.2.6", "decoder.1.6"),
        ("encoder.1.3", "decoder.2.6"),
        ("encoder.0.3", "decoder.3.3"),
    ):
        assert {encoder, decoder} in groups
    assert sum(len(group) for group in groups) == 25  # every convolution but the classifier
    assert list(plan.excluded) == ["classifier"]
    with torch.no_grad():
        assert pruned(x).shape == model(x).shape
    assert count_params(pruned) < 0.3 * count_params(model)
    # Without the tie a decoder channel would be put back by the indices of another one.
    masked = copy.deepcopy(model)
    for group in plan.groups:
        for edit in group.edits:
            layer = masked.get_submodule(edit.target)
            if isinstance(layer, nn.Conv2d) and not edit.produces:
                removed = edit.local[edit.root % 2 == 1]
                layer.weight.data[:, removed] = 0
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), masked(x), atol=1e-4, rtol=1e-4)


def test_a_pruned_deeplab_still_trains_its_auxiliary_head() -> None:
    model, task = make_model("deeplabv3_cityscapes"), make_task(max_scale=1.0)
    pruned, plan = keep_some(model, task.example_input(2))
    layers = {layer for group in plan.groups for layer in group.layers}
    assert {"layer3.0.conv1", "layer3.1.conv3", "pyramid.atrous.1.0", "head.0.0"} <= layers
    entry = pruned.get_submodule("auxiliary.0.0")
    assert entry.in_channels == pruned.get_submodule("layer3.1.conv3").out_channels == 16
    losses: list[float] = []
    finetune(
        pruned, task, epochs=6, lr=0.05, generator=generator(),
        on_epoch=lambda _, loss: losses.append(loss),
    )  # fmt: skip
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", NARROW)
def test_every_criterion_scores_segmenters(name: str, criterion: str) -> None:
    model, task = make_model(name), make_task()
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    layers = [layers[1], layers[-4]] if name == "segnet" else ["layer3.1.conv1", "head.0.0"]
    scores = score_channels(criterion, model, task, layers, seed=0)
    assert set(scores) == set(layers)
    assert all(values.any() for values in scores.values())


def test_fgp_differentiates_the_sum_of_each_predicted_class() -> None:
    """I_c = sum over classes d of the mean over images with d of sum_ij ReLU(G_c F_c), by hand."""
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, NUM_CLASSES, 1)
    model, task = nn.Sequential(first, nn.ReLU(), last).eval(), make_task()
    (x, _), *_ = task.calibration_batches()
    expected = torch.zeros(5)
    for d in range(NUM_CLASSES):
        maps = []
        for image in x:
            feature = first(image[None]).detach().requires_grad_()
            logits = last(F.relu(feature))
            inside = logits.argmax(1) == d
            if inside.any():
                (gradient,) = torch.autograd.grad((logits[:, d] * inside).sum(), feature)
                weight = gradient.mean((2, 3), keepdim=True)
                maps.append(F.relu(weight * feature).sum((0, 2, 3)).detach())
        if maps:
            expected += torch.stack(maps).mean(0)
    scores = score_channels("fgp", model, task, ["0"])["0"]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    by_label = score_channels("fgp", model, task, ["0"], options={"presence": "label"})["0"]
    assert by_label.isfinite().all() and not torch.allclose(by_label, scores)


def test_blocks_are_ranked_by_miou() -> None:
    model, task = make_model("deeplabv3_cityscapes"), make_task(max_scale=1.0)
    finetune(model, task, epochs=4, lr=0.05, generator=generator())
    blocks = removable_blocks(model, task.example_input(2))
    assert blocks == [f"layer{stage}.1" for stage in (1, 2, 3, 4)]
    ranking = rank_blocks(model, task, blocks, order="oneshot")
    for step in ranking.path[:1]:
        without = remove_blocks(copy.deepcopy(model), step.removed)
        found = task.evaluate(without, "calibration")
        assert (step.accuracy, step.loss) == pytest.approx((found["accuracy"], found["loss"]))
    for order in ("greedy", "sr_init", "attribution", "sequential"):
        fresh = make_model("deeplabv3_cityscapes")
        again = rank_blocks(model, task, blocks, order=order, fresh=lambda m=fresh: m)
        assert sorted(again.order) == sorted(blocks)
    scores = score_layers(model, task, blocks, generator=generator())
    assert min(scores.values()) > 0


@pytest.mark.parametrize("name", NARROW)
def test_sparse_training_thins_segmenters(name: str) -> None:
    model, task = make_model(name), make_task(max_scale=1.0)
    plan = plan_pruning(model, task.example_input(2))
    norms = [norm for names in group_norms(model, plan).values() for norm in names]

    SPARSE_TRAINING["dsd"](
        model, task, norms, lam=0.6, q=0.5, epochs=4, lr=0.02, generator=generator()
    )
    scales = torch.cat([model.get_submodule(name).weight.detach().abs() for name in norms])
    assert (scales < 0.95).float().mean() > 0.2 and (scales > 1.05).float().mean() > 0.2


def test_blocks_are_reconstructed() -> None:
    model, task = make_model("deeplabv3_cityscapes"), make_task()
    plan = plan_pruning(model, task.example_input(2))
    pruned, recipe = prune_blockwise(
        model, plan, task, {"layer2.1.conv1": 2, "layer3.1.conv1": 4}, generator=generator(),
        epochs=1, num_vectors=8, batch_size=4, finetune_with_labels=True,
    )  # fmt: skip
    assert {name: len(kept) for name, kept in recipe.kept.items()} == {
        "layer2.1.conv1": 2,
        "layer3.1.conv1": 4,
    }
    assert task.evaluate(pruned)["loss"] > 0


@pytest.mark.parametrize("kwargs", [{}, {"aux_loss": True}], ids=["plain", "aux"])
def test_torchvision_segmenters(kwargs: dict[str, Any]) -> None:
    name = "lraspp_mobilenet_v3_large" if not kwargs else "fcn_resnet50"
    torch.manual_seed(0)
    model = build_model(f"torchvision:{name}", num_classes=NUM_CLASSES, kwargs=kwargs)
    task = make_task()
    x = task.example_input(2)
    with torch.inference_mode():
        output = model(x)
    assert set(output) == ({"out", "aux"} if kwargs else {"out"})
    assert task.misfit(output, x) is None
    assert 0 <= task.evaluate(model)["accuracy"] <= 1
    (images, targets), *_ = task.train_batches(generator())
    loss = task.training_loss(model.train(), images, targets)
    loss.backward()
    used = [p.grad is not None and bool(p.grad.any()) for p in model.parameters()]
    assert sum(used) > 0.9 * len(used)


# --- a search --------------------------------------------------------------------------------


def test_a_search_is_run_exported_and_loaded(tmp_path: Path) -> None:
    from prunesearch.search import load_pruned, run
    from prunesearch.search.runs import Run

    write_camvid(tmp_path, {"train": 12, "val": 4, "test": 4})
    config = {
        "name": "tiny",
        "model": {"name": "segnet", "kwargs": {"width": 2}},
        "data": {"name": "camvid", "root": str(tmp_path), "image_size": [32, 48],
                 "batch_size": 4, "calibration_size": 4},
        "baseline": {"epochs": 1, "lr": 0.05},
        "space": {"criteria": ["magnitude_l1", "fgp"], "blocks": {"mode": "none"}},
        "recover": {"epochs": 0.5},
        "objectives": {"accuracy": "maximize", "macs": "minimize"},
        "search": {"trials": 3, "sensitivity": False},
        "resources": {"max_concurrent": 1},
        "latency": {"runs": 10},
        "cache": {"reuse": "none"},
    }  # fmt: skip
    found = run(config, out=tmp_path / "run")
    rows = found.results()
    assert [str(row.status) for row in rows] == ["completed"] * 3
    assert all(set(row.metrics) == {"pixel_accuracy"} for row in rows)
    assert all(0 <= row.metrics["pixel_accuracy"] <= 1 for row in rows)
    assert set(found.baseline["metrics"]) == {"pixel_accuracy"}
    assert list(found.trials()["metrics"]) == [row.metrics for row in rows]
    folder = Run(tmp_path / "run").export(tmp_path / "out", minimize="macs")
    model = load_pruned(folder)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 48)).shape == (1, 11, 32, 48)
