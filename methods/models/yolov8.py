"""A net in the style of YOLOv8, own implementation: no anchors, boxes as distributions.

After Li et al. 2020 (generalized focal loss, arXiv:2006.04388), Feng et al. 2021 (TOOD, its
task-aligned assignment, arXiv:2108.07755), Wang et al. 2022 (ELAN, arXiv:2211.04800) and Zheng et
al. 2020 (CIoU, arXiv:1911.08287). The split in the C2f block is two convolutions, so that either
half can lose channels of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

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
    cell_centres,
    check_input,
    clipped,
    complete_iou,
    detections,
    doubled,
    prior_bias,
    scaled,
)

STRIDES = (8, 16, 32)
BINS = 16  # of the distribution of each side's distance, in strides
CANDIDATES = 10  # cells that an object may have
SCORE_POWER, IOU_POWER = 0.5, 6.0  # of the alignment of a cell with an object (TOOD, eq. 2)
BOX, CLASS, DISTRIBUTION = 7.5, 0.5, 1.5  # weights of the losses


def yolov8n(num_classes: int = 10) -> nn.Module:
    """YOLOv8n-style net without anchors, own implementation."""
    return YOLOv8(num_classes, depth=1 / 3, width=0.25, last=1024)


def yolov8s(num_classes: int = 10) -> nn.Module:
    """YOLOv8s-style net without anchors, own implementation."""
    return YOLOv8(num_classes, depth=1 / 3, width=0.5, last=1024)


class YOLOv8(nn.Module):
    """Each cell of three levels predicts its classes and the distances to the sides of a box.

    Args:
        num_classes: Classes of objects.
        depth: Factor of the numbers of bottlenecks.
        width: Factor of the channels.
        last: Channels of the coarsest level, before `width`.
    """

    bins: Tensor

    def __init__(self, num_classes: int, *, depth: float, width: float, last: int = 1024) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = (scaled(channels, width) for channels in (64, 128, 256, 512, last))
        few, many = (max(1, round(number * depth)) for number in (3, 6))
        self.num_classes = num_classes
        self.stem = ConvUnit(3, c1, 3, 2)
        self.stage2 = nn.Sequential(ConvUnit(c1, c2, 3, 2), C2f(c2, c2, few, shortcut=True))
        self.stage3 = nn.Sequential(ConvUnit(c2, c3, 3, 2), C2f(c3, c3, many, shortcut=True))
        self.stage4 = nn.Sequential(ConvUnit(c3, c4, 3, 2), C2f(c4, c4, many, shortcut=True))
        self.stage5 = nn.Sequential(
            ConvUnit(c4, c5, 3, 2), C2f(c5, c5, few, shortcut=True), FastPyramid(c5)
        )
        self.up4 = C2f(c5 + c4, c4, few, shortcut=False)
        self.up3 = C2f(c4 + c3, c3, few, shortcut=False)
        self.down3 = ConvUnit(c3, c3, 3, 2)
        self.out4 = C2f(c3 + c4, c4, few, shortcut=False)
        self.down4 = ConvUnit(c4, c4, 3, 2)
        self.out5 = C2f(c4 + c5, c5, few, shortcut=False)
        box_width = max(16, c3 // 4, 4 * BINS)
        class_width = max(c3, min(num_classes, 100))
        self.boxes = nn.ModuleList(_branch(c, box_width, 4 * BINS) for c in (c3, c4, c5))
        self.classes = nn.ModuleList(_branch(c, class_width, num_classes) for c in (c3, c4, c5))
        self.register_buffer("bins", torch.arange(BINS, dtype=torch.float32), persistent=False)
        self._start_biases()

    def forward(self, images: Tensor, targets: Targets | None = None) -> Losses | Detections:
        """Losses by name in train mode, detections in eval mode; see detectors.py.

        Raises:
            ValueError: If the images' sides are no multiples of 32, or targets are missing.
        """
        check_input(images, targets, training=self.training)
        maps = self.prunable_forward(images)
        sides, logits = maps[: len(STRIDES)], maps[len(STRIDES) :]
        centres, strides = cell_centres(logits, STRIDES)
        raw = torch.cat([level.flatten(2) for level in sides], 2).transpose(1, 2)
        scores = torch.cat([level.flatten(2) for level in logits], 2).transpose(1, 2)
        raw = raw.reshape(*raw.shape[:2], 4, BINS)
        boxes = _around(centres, (raw.softmax(3) @ self.bins) * strides)
        if self.training:
            assert targets is not None
            return self._losses(raw, boxes, scores, centres, strides, targets)
        return detections(clipped(boxes, images.shape[-2:]), scores.sigmoid())

    def prunable_forward(self, images: Tensor) -> list[Tensor]:
        """Distances [B, 4 * BINS, h, w] at each level, then logits [B, classes, h, w]."""
        p3 = self.stage3(self.stage2(self.stem(images)))
        p4 = self.stage4(p3)
        p5 = self.stage5(p4)
        middle = self.up4(torch.cat([doubled(p5), p4], 1))
        fine = self.up3(torch.cat([doubled(middle), p3], 1))
        mean = self.out4(torch.cat([self.down3(fine), middle], 1))
        coarse = self.out5(torch.cat([self.down4(mean), p5], 1))
        levels = (fine, mean, coarse)
        boxes = [branch(x) for branch, x in zip(self.boxes, levels, strict=True)]
        return boxes + [branch(x) for branch, x in zip(self.classes, levels, strict=True)]

    def _losses(
        self,
        raw: Tensor,
        boxes: Tensor,
        scores: Tensor,
        centres: Tensor,
        strides: Tensor,
        targets: Targets,
    ) -> Losses:
        """Classes against the alignment, CIoU and distributions of the cells that have an object.

        All are divided by the sum of the alignments.
        """
        wanted = torch.zeros_like(scores)
        box = spread = scores.sum() * 0 + raw.sum() * 0
        for index, target in enumerate(targets):
            if not len(target["labels"]):
                continue
            cell, owner, quality = assign(
                scores[index].detach().sigmoid(), boxes[index].detach(), centres, target
            )
            if not len(cell):
                continue
            label, own = target["labels"][owner] - 1, target["boxes"][owner].to(boxes)
            wanted[index, cell, label] = quality.to(wanted.dtype)
            box = box + ((1 - complete_iou(boxes[index, cell], own)) * quality).sum()
            distances = torch.cat([centres[cell] - own[:, :2], own[:, 2:] - centres[cell]], 1)
            spread = (
                spread
                + (_distribution_loss(raw[index, cell], distances / strides[cell]) * quality).sum()
            )
        kind = F.binary_cross_entropy_with_logits(scores, wanted, reduction="sum")
        total = wanted.sum().clamp(min=1)
        return {
            "box": BOX * box / total,
            "class": CLASS * kind / total,
            "distribution": DISTRIBUTION * spread / total,
        }

    def _start_biases(self) -> None:
        for boxes, classes in zip(self.boxes, self.classes, strict=True):
            assert isinstance(boxes, nn.Sequential) and isinstance(classes, nn.Sequential)
            nn.init.constant_(boxes[-1].bias, 1.0)  # type: ignore[arg-type]
            nn.init.constant_(classes[-1].bias, prior_bias(PRIOR))  # type: ignore[arg-type]


class C2f(nn.Module):
    """A cross stage partial block, every bottleneck of which is seen by the last convolution."""

    def __init__(self, inputs: int, outputs: int, number: int, *, shortcut: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.around = ConvUnit(inputs, half)
        self.main = ConvUnit(inputs, half)
        self.blocks = nn.ModuleList(Bottleneck(half, 3, shortcut=shortcut) for _ in range(number))
        self.merge = ConvUnit((2 + number) * half, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, H, W]."""
        parts = [self.around(x), self.main(x)]
        for block in self.blocks:
            parts.append(block(parts[-1]))
        out: Tensor = self.merge(torch.cat(parts, 1))
        return out


class FastPyramid(nn.Module):
    """Spatial pyramid pooling by one small pooling three times over."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.reduce = ConvUnit(channels, half)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)
        self.merge = ConvUnit(4 * half, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to the same shape."""
        parts = [self.reduce(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        out: Tensor = self.merge(torch.cat(parts, 1))
        return out


def assign(
    scores: Tensor, boxes: Tensor, centres: Tensor, target: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gives each object of an image the cells whose class and box suit it best (TOOD).

    A cell's alignment with an object is score^.5 * IoU^6. Of the cells with their centre in the
    object the best ten are taken; a cell that several objects take is that of the largest IoU.

    Args:
        scores: Of each class, 0 to 1, [n, classes].
        boxes: xyxy in pixels, [n, 4].
        centres: Of the cells, in pixels, [n, 2].
        target: `boxes` [m, 4] and `labels` [m] of the image, m > 0.

    Returns:
        Cells [k], their objects [k], and the alignments, scaled so that each object's largest is
        its largest IoU, [k].
    """
    wanted = target["boxes"].to(boxes)
    labels = target["labels"]
    overlap = complete_iou(wanted[:, None], boxes).clamp(min=0)
    offsets = torch.cat([centres - wanted[:, None, :2], wanted[:, None, 2:] - centres], 2)
    inside = offsets.amin(2) > 0
    alignment = scores[:, labels - 1].T.pow(SCORE_POWER) * overlap.pow(IOU_POWER) * inside
    best = alignment.topk(min(CANDIDATES, len(centres)), 1).indices
    taken = torch.zeros_like(inside).scatter_(1, best, True) & inside
    owner = torch.where(taken, overlap, -1.0).argmax(0)
    cell = taken.any(0).nonzero()[:, 0]
    owner = owner[cell]
    mine = torch.zeros_like(alignment)
    mine[owner, cell] = alignment[owner, cell]
    reached = torch.zeros_like(overlap)
    reached[owner, cell] = overlap[owner, cell]
    scale = reached.amax(1) / mine.amax(1).clamp(min=1e-9)
    return cell, owner, alignment[owner, cell] * scale[owner]


def _distribution_loss(raw: Tensor, distances: Tensor) -> Tensor:
    """Cross entropy of the two bins around each distance (generalized focal loss, eq. 6).

    Args:
        raw: Logits [k, 4, BINS].
        distances: To left, top, right and bottom, in strides, [k, 4].

    Returns:
        Mean over the sides, [k].
    """
    distances = distances.clamp(0, BINS - 1 - 0.01)
    low = distances.floor()
    share = distances - low
    logs = raw.log_softmax(2)
    left = logs.gather(2, low.long()[..., None])[..., 0]
    right = logs.gather(2, low.long()[..., None] + 1)[..., 0]
    return -((1 - share) * left + share * right).mean(1)


def _around(centres: Tensor, distances: Tensor) -> Tensor:
    """Boxes xyxy [..., 4] from centres [n, 2] and distances to left, top, right and bottom."""
    return torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], -1)


def _branch(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        ConvUnit(inputs, width, 3), ConvUnit(width, width, 3), nn.Conv2d(width, outputs, 1)
    )
