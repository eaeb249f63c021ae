"""The YOLO nets: counts, losses and assignments against references."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import complete_box_iou_loss

from prunesearch.methods.models.build import build_model
from prunesearch.methods.models.yolo_parts import cell_centres, complete_iou, detections, scaled
from prunesearch.methods.models.yolov5 import ANCHORS, MAX_RATIO, STRIDES, YOLOv5, match, yolov5m
from prunesearch.methods.models.yolov8 import BINS, _distribution_loss, assign, yolov8n


def macs_of(model, size):
    """Multiply-adds of one image, without computing anything."""
    with FlopCounterMode(display=False) as counter:
        model.prunable_forward(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2


def test_counts_of_the_reference_model():
    """METHODS: YOLOv5m, v5.0, 80 classes, 640 pixels: 21.376 M parameters, 25.62 G MACs."""
    with torch.device("meta"):
        model = yolov5m(80)
    model.eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(21.376, abs=0.001)
    assert macs_of(model, 640) / 1e9 == pytest.approx(25.62, abs=0.01)


def test_counts_of_the_anchor_free_net():
    with torch.device("meta"):
        model = yolov8n(80)
    model.eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(3.15, abs=0.01)
    assert macs_of(model, 640) / 1e9 == pytest.approx(4.35, abs=0.1)


@pytest.mark.parametrize(
    ("channels", "width", "expected"), [(64, 0.25, 16), (64, 0.75, 48), (100, 0.5, 56)]
)
def test_scaled(channels, width, expected):
    assert scaled(channels, width) == expected


def random_boxes(count, generator):
    corner = torch.rand(count, 2, generator=generator) * 40
    return torch.cat([corner, corner + 2 + torch.rand(count, 2, generator=generator) * 30], 1)


def test_complete_iou_against_torchvision():
    generator = torch.Generator().manual_seed(0)
    first, second = random_boxes(50, generator), random_boxes(50, generator)
    first.requires_grad_()
    ours = 1 - complete_iou(first, second)
    theirs = complete_box_iou_loss(first, second)
    assert torch.allclose(ours, theirs, atol=1e-5)
    mine = torch.autograd.grad(ours.sum(), first)[0]
    assert torch.allclose(mine, torch.autograd.grad(theirs.sum(), first)[0], atol=1e-5)
    assert complete_iou(first, first).detach().tolist() == pytest.approx([1] * 50, abs=1e-5)


def test_match_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    targets = [
        {"boxes": random_boxes(n, generator), "labels": torch.randint(1, 4, (n,))}
        for n in (5, 0, 7)
    ]
    for level, stride in enumerate(STRIDES):
        anchors = torch.tensor(ANCHORS[level], dtype=torch.float32)
        rows, columns = 96 // stride, 64 // stride  # boxes may lie beyond the last column
        expected = set()
        for image, target in enumerate(targets):
            for box, label in zip(
                target["boxes"].tolist(), target["labels"].tolist(), strict=True
            ):
                x, y = (box[0] + box[2]) / 2 / stride, (box[1] + box[3]) / 2 / stride
                i, j = min(int(x), columns - 1), min(int(y), rows - 1)
                places = [
                    (i, j),
                    (i - 1 if x - i < 0.5 else i + 1, j),
                    (i, j - 1 if y - j < 0.5 else j + 1),
                ]
                for n, (wide, high) in enumerate(anchors.tolist()):
                    ratios = [(box[2] - box[0]) / wide, (box[3] - box[1]) / high]
                    if max(max(r, 1 / r) for r in ratios) >= MAX_RATIO:
                        continue
                    for column, row in places:
                        if 0 <= column < columns and 0 <= row < rows:
                            expected.add((image, n, row, column, label, round(box[0], 3)))
        found = match(targets, anchors, stride, (rows, columns))
        got = list(
            zip(
                *(part.tolist() for part in found.place),
                found.labels.tolist(),
                [round(x, 3) for x in found.boxes[:, 0].tolist()],
                strict=True,
            )
        )
        assert len(got) == len(set(got)) and set(got) == expected


def test_every_shape_of_object_has_an_anchor():
    """An object of 16 to 512 pixels a side, up to three times as long as wide, is learnt."""
    for side in (16, 40, 100, 250, 500):
        for ratio in (1 / 3, 1, 3):
            wide, high = side * ratio**0.5, side / ratio**0.5
            target = {
                "boxes": torch.tensor(
                    [[300 - wide / 2, 300 - high / 2, 300 + wide / 2, 300 + high / 2]]
                ),
                "labels": torch.tensor([1]),
            }
            assert any(
                len(match([target], torch.tensor(ANCHORS[n]).float(), s, (640 // s,) * 2).labels)
                for n, s in enumerate(STRIDES)
            )


def test_decoded_boxes_lie_around_their_cells():
    model = YOLOv5(2, depth=0.33, width=0.25)
    prediction = torch.zeros(1, 3, 4, 6, 7)
    boxes = model._decode(prediction, 1)
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    assert centres[0, 0, 2, 3].tolist() == [3.5 * 16, 2.5 * 16]  # the middle of the cell
    assert (boxes[0, :, 2, 3, 2:] - boxes[0, :, 2, 3, :2]).tolist() == [
        list(a) for a in ANCHORS[1]
    ]


def test_detections_are_thinned_within_the_classes():
    boxes = torch.tensor([[[0, 0, 10, 10], [0, 0, 10, 9.5], [0, 0, 10, 10], [40, 40, 50, 50]]])
    scores = torch.tensor([[[0.9, 0.0], [0.8, 0.1], [0.1, 0.7], [0.005, 0.004]]])
    (found,) = detections(boxes.float(), scores)
    assert found["labels"].tolist() == [1, 2]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.7])


def test_cell_centres():
    maps = [torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 1, 1)]
    points, strides = cell_centres(maps, (8, 16))
    assert points.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8]]
    assert strides[:, 0].tolist() == [8] * 6 + [16]


def test_assignment_by_its_definition():
    generator = torch.Generator().manual_seed(1)
    centres, _ = cell_centres([torch.zeros(1, 1, 8, 8)], (8,))
    offsets = 4 + torch.rand(64, 4, generator=generator) * 16
    boxes = torch.cat([centres - offsets[:, :2], centres + offsets[:, 2:]], 1)
    scores = torch.rand(64, 3, generator=generator)
    target = {
        "boxes": torch.tensor([[4.0, 4.0, 40.0, 36.0], [20.0, 10.0, 60.0, 60.0]]),
        "labels": torch.tensor([2, 3]),
    }
    cell, owner, quality = assign(scores, boxes, centres, target)
    assert len(cell) == len(set(cell.tolist())) and 10 <= len(cell) <= 20
    overlap = complete_iou(target["boxes"][:, None], boxes).clamp(min=0)
    alignment = torch.stack(
        [scores[:, label - 1] ** 0.5 * overlap[n] ** 6 for n, label in enumerate([2, 3])]
    )
    for n in range(2):
        x, y = centres[:, 0], centres[:, 1]
        left, top, right, bottom = target["boxes"][n]
        inside = (x > left) & (x < right) & (y > top) & (y < bottom)
        best = (alignment[n] * inside).topk(10).indices
        mine = cell[owner == n]
        assert set(mine.tolist()) <= set(best[inside[best]].tolist())
        lost = set(best[inside[best]].tolist()) - set(mine.tolist())
        assert all(overlap[1 - n, c] >= overlap[n, c] for c in lost)
        assert quality[owner == n].max() == pytest.approx(float(overlap[n, mine].max()), rel=1e-5)


def test_distribution_loss_is_least_at_the_distance():
    distances = torch.tensor([[3.25, 0.0, 7.0, 2.5]])
    weights = torch.zeros(1, 4, BINS)
    for side, distance in enumerate(distances[0].tolist()):
        low = int(distance)
        weights[0, side, low] = 1 - (distance - low)
        if distance > low:
            weights[0, side, low + 1] = distance - low
    exact = _distribution_loss(weights.clamp(min=1e-9).log(), distances)
    entropy = -(weights * weights.clamp(min=1e-9).log()).sum(2).mean(1)
    assert exact.tolist() == pytest.approx(entropy.tolist(), abs=1e-4)
    assert _distribution_loss(torch.zeros(1, 4, BINS), distances) > exact


@pytest.mark.parametrize("name", ["yolov5n", "yolov8n"])
def test_images_of_other_sizes_are_refused(name):
    model = build_model(name, num_classes=2)
    with pytest.raises(ValueError, match="multiple of 32"):
        model(torch.zeros(1, 3, 72, 64))
    with pytest.raises(ValueError, match="targets"):
        model.train()(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("name", ["yolov5n", "yolov8n"])
def test_channels_last_gives_the_same_loss(name):
    torch.manual_seed(0)
    model = build_model(name, num_classes=2).train()
    images = torch.randn(2, 3, 64, 64)
    targets = [
        {"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.tensor([[10.0, 20.0, 60.0, 50.0]]), "labels": torch.tensor([2])},
    ]
    first = torch.stack(list(model(images, targets).values()))
    model.to(memory_format=torch.channels_last)
    second = torch.stack(list(model(images, targets).values()))
    assert torch.allclose(first, second, rtol=1e-3)
