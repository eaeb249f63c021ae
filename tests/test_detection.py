"""The detection task: figures, batches, losses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunesearch.methods.data.boxes import COLUMNS
from prunesearch.methods.data.image_data import ImageData, Split, channel_statistics
from prunesearch.methods.finetune import finetune, recalibrate_batch_norm
from prunesearch.methods.models.build import build_model
from prunesearch.methods.tasks.detection import DetectionTask, mirror
from prunesearch.methods.tasks.detection_meter import DetectionMeter, best_f1, missing

CLASSES = ("left", "right")


def boxes_of(*rows: tuple[float, ...], crowd: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Objects from rows (x1, y1, x2, y2, label)."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    flags = torch.zeros(len(table), dtype=torch.int64)
    flags[list(crowd)] = 1
    return {"boxes": table[:, :4], "labels": table[:, 4].long(), "iscrowd": flags}


def found(*rows: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """Detections from rows (x1, y1, x2, y2, label, score)."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return {"boxes": table[:, :4], "labels": table[:, 4].long(), "scores": table[:, 5]}


A = (0.0, 0.0, 10.0, 10.0, 1.0)
B = (20.0, 20.0, 30.0, 40.0, 2.0)


def figures(detections, targets, accuracy="map50_95"):
    meter = DetectionMeter(CLASSES, accuracy)
    for one, other in zip(detections, targets, strict=True):
        meter.update([one], [other])
    return meter.compute()


def test_perfect_detections():
    result = figures([found((*A, 0.9), (*B, 0.8)), found()], [boxes_of(A, B), boxes_of()])
    assert result["accuracy"] == result["map50_95"] == result["map50"] == 1
    assert result["ap_left"] == result["ap_right"] == 1
    assert result["f1"] == 1 and result["f1_threshold"] == pytest.approx(0.8)
    assert result["loss"] == pytest.approx((0.1 + 0.2) / 2)


def test_nothing_found_and_nothing_there():
    lost = figures([found()], [boxes_of(A)])
    assert lost["accuracy"] == lost["f1"] == 0 and lost["loss"] == 1
    empty = figures([found((*A, 0.5))], [boxes_of()])
    assert empty["accuracy"] == empty["f1"] == empty["loss"] == 0


def test_iou_counts_at_each_threshold():
    """A box of IoU .72 is right at .5, .55, .6, .65 and .7: five thresholds of ten."""
    result = figures([found((0, 0, 10, 7.2, 1, 0.9))], [boxes_of(A)])
    assert result["map50"] == 1
    assert result["map50_95"] == pytest.approx(0.5)
    assert figures([found((0, 0, 10, 7.2, 1, 0.9))], [boxes_of(A)], "map50")["accuracy"] == 1
    assert result["loss"] == pytest.approx(1 - 0.9 * 0.72)


def test_average_precision_by_hand():
    """Two objects, found at ranks 1 and 3: precision 1 up to recall .5 (51 points), then 2/3."""
    C = (50.0, 0.0, 60.0, 10.0, 1.0)
    wrong = (80.0, 80.0, 90.0, 90.0, 1.0)
    result = figures([found((*A, 0.9), (*wrong, 0.8), (*C, 0.7))], [boxes_of(A, C)])
    assert result["map50"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert result["f1"] == pytest.approx(2 * 2 / (3 + 2))
    assert result["f1_threshold"] == pytest.approx(0.7)


def test_ignored_objects_count_neither_way():
    targets = [boxes_of(A, B, crowd=(1,))]
    only = figures([found((*A, 0.9))], targets)
    with_crowd = figures([found((*A, 0.5), (*B, 0.9))], targets)
    for result in (only, with_crowd):
        assert result["map50"] == result["f1"] == 1
    assert with_crowd["loss"] == pytest.approx(0.5)


def brute_f1(detections, targets):
    """Every threshold tried, matching anew each time."""
    scores = sorted({s for d in detections for s in d["scores"].tolist()})
    best = (0.0, 1.0)
    for threshold in scores:
        hits = wrong = 0
        for one, other in zip(detections, targets, strict=True):
            free = [n for n in range(len(other["labels"])) if not other["iscrowd"][n]]
            rows = sorted(range(len(one["scores"])), key=lambda n: -float(one["scores"][n]))
            for row in rows:
                if one["scores"][row] < threshold:
                    continue
                overlaps = {n: overlap(one, row, other, n) for n in free}
                match = max(overlaps, key=lambda n: overlaps[n], default=None)
                if match is not None and overlaps[match] >= 0.5:
                    free.remove(match)
                    hits += 1
                elif not any(
                    other["iscrowd"][n] and overlap(one, row, other, n) >= 0.5
                    for n in range(len(other["labels"]))
                ):
                    wrong += 1
        num_objects = sum(int((t["iscrowd"] == 0).sum()) for t in targets)
        f1 = 2 * hits / (hits + wrong + num_objects)
        if f1 > best[0]:
            best = (f1, threshold)
    return best


def overlap(one, row, other, n):
    if one["labels"][row] != other["labels"][n]:
        return 0.0
    a, b = one["boxes"][row].tolist(), other["boxes"][n].tolist()
    wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    high = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return wide * high / (sum(areas) - wide * high)


@pytest.mark.parametrize("seed", range(5))
def test_best_f1_against_brute_force(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(count, columns):
        corner = torch.rand(count, 2, generator=generator) * 10
        side = 4 + torch.rand(count, 2, generator=generator) * 8
        label = torch.randint(1, 3, (count, 1), generator=generator)
        score = torch.randint(1, 10, (count, 1), generator=generator) / 10
        return torch.cat([corner, corner + side, label, score], 1)[:, :columns].tolist()

    targets = [boxes_of(*draw(4, 5), crowd=(0,)) for _ in range(4)]
    detections = [found(*draw(7, 6)) for _ in range(4)]
    f1, threshold = best_f1(detections, targets)
    expected, _ = brute_f1(detections, targets)
    assert f1 == pytest.approx(expected)
    assert expected == 0 or threshold in [
        pytest.approx(s) for d in detections for s in d["scores"]
    ]


def test_missing_takes_the_best_detection_of_the_class():
    weak, strong, other = (*A, 0.3), (0, 0, 10, 5, 1, 0.9), (*A[:4], 2, 1.0)
    assert missing([found(weak, strong, other)], [boxes_of(A)]) == pytest.approx(1 - 0.45)


# --- batches ---------------------------------------------------------------------------------


def make_data(num_train: int = 10, size: int = 64) -> ImageData:
    """Bright squares on noise: class 1 in the left half, class 2 in the right; one ignored."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        images = torch.randint(0, 60, (count, 3, size, size), generator=generator).byte()
        rows = torch.zeros(count, 3, COLUMNS)
        for n in range(count):
            for row, (left, label) in enumerate(((4, 1), (36, 2))):
                top = int(torch.randint(0, 30, (), generator=generator))
                images[n, :, top : top + 24, left : left + 24] = 200 + 20 * row
                rows[n, row] = torch.tensor([left, top, left + 24, top + 24, label, 0])
            rows[n, 2] = torch.tensor([0, 50, 60, 64, 1, 1])
        rows[0, 1:] = 0  # an image with one object
        return Split(images, rows)

    train = split(num_train)
    mean, std = channel_statistics(train.images)
    return ImageData("squares", CLASSES, train, split(4), split(4), mean, std, 0, True, True)


@pytest.fixture(scope="module")
def task():
    return DetectionTask(make_data(), batch_size=4, calibration_size=5)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model("fasterrcnn_resnet18_fpn", num_classes=2)


def test_batches(task):
    generator = torch.Generator().manual_seed(0)
    batches = list(task.train_batches(generator, augment=False))
    assert [len(images) for images, _ in batches] == [4, 4, 2]
    for images, targets in batches:
        assert images.dtype == torch.float32 and len(targets) == len(images)
        for target in targets:
            assert set(target) == {"boxes", "labels", "iscrowd"}
            assert target["boxes"].shape[1:] == (4,) and target["labels"].min() >= 1
    assert sum(len(images) for images, _ in task.calibration_batches()) == 5
    assert [len(t["labels"]) for t in next(task.batches("train"))[1]] == [1, 3, 3, 3]
    images = torch.cat([i for i, _ in task.batches("train")])
    assert images.mean().abs() < 0.01 and images.std() == pytest.approx(1, abs=0.01)


def test_mirrored_boxes_follow_their_pixels():
    data = make_data()
    images, boxes = data.train.images, data.train.labels
    turned, moved = mirror(images, boxes, torch.Generator().manual_seed(0))
    changed = [not torch.equal(a, b) for a, b in zip(images, turned, strict=True)]
    assert 1 < sum(changed) < 9
    for n, flipped in enumerate(changed):
        assert torch.equal(turned[n], images[n].flip(2) if flipped else images[n])
        for row in moved[n, :2]:
            left, top, right, bottom = (int(v) for v in row[:4])
            if row[4]:
                assert turned[n, :, top:bottom, left:right].min() >= 200
        assert torch.equal(moved[n, :, 4:], boxes[n, :, 4:])
    assert (moved[0, 1:] == 0).all()  # rows without an object stay empty


def test_training_loss_is_the_sum_without_ignored_objects(task, model):
    images, targets = next(task.batches("train"))
    model.train()
    torch.manual_seed(1)
    loss = task.training_loss(model, images, targets)
    kept = [
        {"boxes": t["boxes"][t["iscrowd"] == 0], "labels": t["labels"][t["iscrowd"] == 0]}
        for t in targets
    ]
    torch.manual_seed(1)
    losses = {name: value.item() for name, value in model(images, kept).items()}
    assert set(losses) == {
        "loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"
    }  # fmt: skip
    assert loss.item() == pytest.approx(sum(losses.values()), rel=1e-5)


def test_a_scored_model_keeps_its_mode_and_statistics(task, model):
    images, targets = next(task.batches("train"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = task.training_loss(model, images, targets)
    second = task.training_loss(model, images, targets)
    assert first.requires_grad and first.item() == second.item()  # the same boxes are drawn
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_evaluation_is_repeatable_and_recalibration_needs_no_targets(task, model):
    first = task.evaluate(model)
    assert {"accuracy", "loss", "map50", "map50_95", "f1", "f1_threshold"} <= set(first)
    assert task.evaluate(model, batch_size=1)["map50"] == pytest.approx(first["map50"], abs=1e-3)
    assert task.evaluate(model) == first
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = norms[3].running_mean.clone()
    recalibrate_batch_norm(model, task, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(norms[3].running_mean, before)
    assert not any(module.training for module in model.modules())


def test_finetuning_learns(task):
    torch.manual_seed(0)
    model = build_model("yolov5n", num_classes=2)
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    finetune(
        model, task, epochs=30, lr=0.02, generator=generator,
        on_epoch=lambda _, loss: losses.append(loss),
    )  # fmt: skip
    assert losses[-1] < 0.6 * losses[0]
    assert task.evaluate(model, "train")["map50"] > 0.5


def test_what_makes_no_sense_is_said(task):
    for method in ("fgp", "hessian", "synflow", "distill"):
        assert task.supports(method)
    for method in ("taylor", "dsd", "blockwipg", "hrank", "greedy", "attribution", "random"):
        assert task.supports(method) is None
    with pytest.raises(ValueError, match="training_loss"):
        task.loss(None, [])
    images = task.example_input(2)
    assert task.misfit(torch.zeros(2, 3), images) and task.misfit([{}], images)
    assert task.misfit([found(), found()], images) is None
    with pytest.raises(ValueError, match="map75"):
        DetectionTask(make_data(), accuracy="map75")
    assert DetectionTask(make_data(), accuracy="map50").metric == "mAP@.5"
