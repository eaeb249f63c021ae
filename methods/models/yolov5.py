"""YOLOv5, own implementation: the layout of release 5.0 (Focus, C3, SPP, path aggregation).

After Redmon and Farhadi 2018 (arXiv:1804.02767), Wang et al. 2020 (CSPNet, arXiv:1911.11929),
Bochkovskiy et al. 2020 (YOLOv4, arXiv:2004.10934), He et al. 2015 (SPP, arXiv:1406.4729) and Liu
et al. 2018 (PANet, arXiv:1803.01534).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .yolo_parts import (
    PRIOR,
    Bottleneck,
    ConvUnit,
    Detections,
    Losses,
    Targets,
    check_input,
    clipped,
    complete_iou,
    detections,
    doubled,
    prior_bias,
    scaled,
)

STRIDES = (8, 16, 32)
# Width and height in pixels, three a level: the usual ones, clustered on COCO at 640 pixels.
ANCHORS = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
MAX_RATIO = 4.0  # of an object's side to its anchor's, and the other way round
BOX, OBJECTNESS, CLASS = 2.0, 1.0, 1.0  # weights of the losses
LEVEL_WEIGHTS = (1.0, 0.5, 0.25)  # of objectness: fewer cells see fewer objects


def yolov5n(num_classes: int = 10, *, anchor_scale: float = 1.0) -> nn.Module:
    """YOLOv5n (v5.0 layout), own implementation."""
    return YOLOv5(num_classes, depth=0.33, width=0.25, anchor_scale=anchor_scale)


def yolov5s(num_classes: int = 10, *, anchor_scale: float = 1.0) -> nn.Module:
    """YOLOv5s (v5.0 layout), own implementation."""
    return YOLOv5(num_classes, depth=0.33, width=0.5, anchor_scale=anchor_scale)


def yolov5m(num_classes: int = 10, *, anchor_scale: float = 1.0) -> nn.Module:
    """YOLOv5m (v5.0 layout), own implementation; 21.4 M parameters with 80 classes."""
    return YOLOv5(num_classes, depth=0.67, width=0.75, anchor_scale=anchor_scale)


class YOLOv5(nn.Module):
    """Anchors at three levels; each predicts a box, whether there is an object, and its class.

    Args:
        num_classes: Classes of objects.
        depth: Factor of the numbers of bottlenecks.
        width: Factor of the channels.
        anchor_scale: Factor of the anchors' sides, which suit images of 640 pixels.
    """

    anchors: Tensor

    def __init__(
        self, num_classes: int, *, depth: float, width: float, anchor_scale: float = 1.0
    ) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = (scaled(channels, width) for channels in (64, 128, 256, 512, 1024))
        few, many = (max(1, round(number * depth)) for number in (3, 9))
        self.in_channels, self.num_classes = 3, num_classes  # the first convolution has 12
        self.stem = Focus(3, c1)
        self.stage2 = nn.Sequential(ConvUnit(c1, c2, 3, 2), C3(c2, c2, few, shortcut=True))
        self.stage3 = nn.Sequential(ConvUnit(c2, c3, 3, 2), C3(c3, c3, many, shortcut=True))
        self.stage4 = nn.Sequential(ConvUnit(c3, c4, 3, 2), C3(c4, c4, many, shortcut=True))
        self.stage5 = nn.Sequential(
            ConvUnit(c4, c5, 3, 2), SpatialPyramid(c5), C3(c5, c5, few, shortcut=False)
        )
        self.reduce5 = ConvUnit(c5, c4)
        self.up4 = C3(2 * c4, c4, few, shortcut=False)
        self.reduce4 = ConvUnit(c4, c3)
        self.up3 = C3(2 * c3, c3, few, shortcut=False)
        self.down3 = ConvUnit(c3, c3, 3, 2)
        self.out4 = C3(2 * c3, c4, few, shortcut=False)
        self.down4 = ConvUnit(c4, c4, 3, 2)
        self.out5 = C3(2 * c4, c5, few, shortcut=False)
        outputs = len(ANCHORS[0]) * (5 + num_classes)
        self.heads = nn.ModuleList(nn.Conv2d(c, outputs, 1) for c in (c3, c4, c5))
        self.register_buffer("anchors", torch.tensor(ANCHORS) * anchor_scale, persistent=False)
        self._start_biases()

    def forward(self, images: Tensor, targets: Targets | None = None) -> Losses | Detections:
        """Losses by name in train mode, detections in eval mode; see detectors.py.

        Raises:
            ValueError: If the images' sides are no multiples of 32, or targets are missing.
        """
        check_input(images, targets, training=self.training)
        predictions = [self._by_anchor(level) for level in self.prunable_forward(images)]
        if self.training:
            assert targets is not None
            return self._losses(predictions, targets)
        boxes, scores = [], []
        for level, prediction in enumerate(predictions):
            chance = prediction[..., 4:].sigmoid()
            boxes.append(self._decode(prediction, level).flatten(1, 3))
            scores.append((chance[..., :1] * chance[..., 1:]).flatten(1, 3))
        inside = clipped(torch.cat(boxes, 1), images.shape[-2:])
        return detections(inside, torch.cat(scores, 1))

    def prunable_forward(self, images: Tensor) -> list[Tensor]:
        """What the heads put out at each level, [B, anchors * (5 + classes), h, w]."""
        p3 = self.stage3(self.stage2(self.stem(images)))
        p4 = self.stage4(p3)
        top = self.reduce5(self.stage5(p4))
        middle = self.reduce4(self.up4(torch.cat([doubled(top), p4], 1)))
        fine = self.up3(torch.cat([doubled(middle), p3], 1))
        mean = self.out4(torch.cat([self.down3(fine), middle], 1))
        coarse = self.out5(torch.cat([self.down4(mean), top], 1))
        return [head(x) for head, x in zip(self.heads, (fine, mean, coarse), strict=True)]

    def _by_anchor(self, level: Tensor) -> Tensor:
        """[B, anchors, h, w, 5 + classes]."""
        shape = (len(level), len(ANCHORS[0]), -1, *level.shape[-2:])
        return level.view(shape).permute(0, 1, 3, 4, 2)

    def _decode(self, prediction: Tensor, level: int) -> Tensor:
        """Boxes xyxy in pixels, [B, anchors, h, w, 4]."""
        height, width = prediction.shape[2:4]
        rows, columns = torch.meshgrid(
            torch.arange(height, device=prediction.device),
            torch.arange(width, device=prediction.device),
            indexing="ij",
        )
        cells = torch.stack([columns, rows], -1)
        anchors = self.anchors[level][:, None, None]
        return _decoded(prediction[..., :4], cells, anchors, STRIDES[level])

    def _losses(self, predictions: Sequence[Tensor], targets: Targets) -> Losses:
        """Sums over the matched anchors and over all cells, divided by the number of matches."""
        found = [self._level_losses(n, level, targets) for n, level in enumerate(predictions)]
        count = max(1, sum(number for _, number in found))
        box, objectness, kind = torch.stack([sums for sums, _ in found]).sum(0) / count
        return {"box": BOX * box, "objectness": OBJECTNESS * objectness, "class": CLASS * kind}

    def _level_losses(
        self, level: int, prediction: Tensor, targets: Targets
    ) -> tuple[Tensor, int]:
        """Sums of the losses of box, objectness and class, [3], and the number of matches.

        Objectness learns the CIoU of the box that is predicted.
        """
        anchors, stride = self.anchors[level], STRIDES[level]
        found = match(targets, anchors, stride, prediction.shape[2:4])
        _, anchor, row, column = found.place
        chosen = prediction[found.place]
        cells = torch.stack([column, row], -1)
        overlap = complete_iou(
            _decoded(chosen[:, :4], cells, anchors[anchor], stride), found.boxes
        )
        classes = F.one_hot(found.labels - 1, self.num_classes).to(chosen.dtype)
        wanted = prediction.new_zeros(prediction.shape[:4])
        quality = overlap.detach().clamp(min=0).to(wanted.dtype)
        wanted.view(-1).scatter_reduce_(0, _flat_index(found.place, wanted.shape), quality, "amax")
        sums = (
            (1 - overlap).sum(),
            LEVEL_WEIGHTS[level] * _cross_entropy(prediction[..., 4], wanted),
            _cross_entropy(chosen[:, 5:], classes),
        )
        return torch.stack(sums), len(anchor)

    def _start_biases(self) -> None:
        for head in self.heads:
            assert isinstance(head, nn.Conv2d) and head.bias is not None
            with torch.no_grad():
                bias = head.bias.view(len(ANCHORS[0]), -1)
                bias[:, 4] = prior_bias(PRIOR)
                bias[:, 5:] = prior_bias(1 / (self.num_classes + 1))


class Focus(nn.Module):
    """Every second row and column of an image as channels of their own, and a convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = ConvUnit(4 * inputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, outputs, H / 2, W / 2]."""
        parts = [x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
        out: Tensor = self.conv(torch.cat(parts, 1))
        return out


class C3(nn.Module):
    """A cross stage partial block with three convolutions: half of the channels go around."""

    def __init__(self, inputs: int, outputs: int, number: int, *, shortcut: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.main = ConvUnit(inputs, half)
        self.around = ConvUnit(inputs, half)
        self.blocks = nn.Sequential(
            *(Bottleneck(half, 1, shortcut=shortcut) for _ in range(number))
        )
        self.merge = ConvUnit(2 * half, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, H, W]."""
        out: Tensor = self.merge(torch.cat([self.blocks(self.main(x)), self.around(x)], 1))
        return out


class SpatialPyramid(nn.Module):
    """Largest values around each pixel at three scales, beside the pixel's own."""

    def __init__(self, channels: int, kernels: Sequence[int] = (5, 9, 13)) -> None:
        super().__init__()
        half = channels // 2
        self.reduce = ConvUnit(channels, half)
        self.pools = nn.ModuleList(nn.MaxPool2d(k, stride=1, padding=k // 2) for k in kernels)
        self.merge = ConvUnit(half * (1 + len(kernels)), channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to the same shape."""
        x = self.reduce(x)
        out: Tensor = self.merge(torch.cat([x, *(pool(x) for pool in self.pools)], 1))
        return out


class Matches:
    """The anchors of one level that objects are learnt at.

    Attributes:
        place: Image, anchor, row and column of each, int64 [n] each.
        boxes: Of their objects, xyxy in pixels, [n, 4].
        labels: From 1, [n].
    """

    def __init__(self, place: tuple[Tensor, ...], boxes: Tensor, labels: Tensor) -> None:
        self.place, self.boxes, self.labels = place, boxes, labels


def match(targets: Targets, anchors: Tensor, stride: int, grid: Sequence[int]) -> Matches:
    """Gives each object the anchors of its shape in its cell and in the two nearest neighbours.

    An anchor suits where neither side is more than four times the other's.

    Args:
        targets: For each image `boxes` [n, 4] and `labels` [n].
        anchors: Width and height in pixels, [anchors, 2].
        stride: Pixels between cells.
        grid: Rows and columns of the level.
    """
    boxes = torch.cat([target["boxes"] for target in targets]).to(anchors)
    labels = torch.cat([target["labels"] for target in targets])
    counts = torch.tensor([len(target["labels"]) for target in targets], device=labels.device)
    images = torch.arange(len(targets), device=labels.device).repeat_interleave(counts)
    ratios = (boxes[:, 2:] - boxes[:, :2]) / anchors[:, None]
    suits = torch.maximum(ratios, 1 / ratios.clamp(min=1e-9)).amax(2) < MAX_RATIO
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 / stride
    size = centres.new_tensor([grid[1], grid[0]])
    cells = torch.minimum(centres.floor(), size - 1)
    sides = torch.where(centres - cells < 0.5, -1.0, 1.0)
    steps = torch.stack(
        [
            torch.zeros_like(sides),
            sides * sides.new_tensor([1, 0]),
            sides * sides.new_tensor([0, 1]),
        ]
    )
    places = cells + steps  # [3, n, 2]
    inside = ((places >= 0) & (places < size)).all(2)
    step, anchor, index = (inside[:, None] & suits).nonzero(as_tuple=True)
    column, row = places[step, index].long().unbind(1)
    return Matches((images[index], anchor, row, column), boxes[index], labels[index])


def _cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")


def _flat_index(place: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Index into a flattened tensor of the shape."""
    index = place[0]
    for part, size in zip(place[1:], shape[1:], strict=True):
        index = index * size + part
    return index


def _decoded(raw: Tensor, cells: Tensor, anchors: Tensor, stride: int) -> Tensor:
    """Boxes xyxy in pixels: the centre up to half a cell outside its cell, sides up to 4 times."""
    centres = (raw[..., :2].sigmoid() * 2 - 0.5 + cells) * stride
    halves = (raw[..., 2:4].sigmoid() * 2).square() * anchors / 2
    return torch.cat([centres - halves, centres + halves], -1)
