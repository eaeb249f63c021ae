"""What the YOLO nets share: layers, from boxes to detections, the CIoU of pairs of boxes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Detections = list[dict[str, Tensor]]
Losses = dict[str, Tensor]
Targets = Sequence[Mapping[str, Tensor]]

MIN_SCORE = 0.01
NMS_IOU = 0.6
MAX_CANDIDATES, MAX_DETECTIONS = 1000, 100  # of an image
PRIOR = 0.01  # probability of an object before training (Lin et al. 2017, arXiv:1708.02002)


class ConvUnit(nn.Sequential):
    """Convolution, batch norm, SiLU.

    Args:
        inputs: Channels.
        outputs: Channels.
        kernel: Height and width.
        stride: Of the convolution.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03),
            nn.SiLU(inplace=True),
        )


class Bottleneck(nn.Module):
    """Two convolutions, around which the input goes where `shortcut` says so.

    Args:
        channels: In and out.
        kernel: Of the first convolution; the second has 3.
        shortcut: Whether the input is added.
    """

    def __init__(self, channels: int, kernel: int, *, shortcut: bool) -> None:
        super().__init__()
        self.reduce = ConvUnit(channels, channels, kernel)
        self.conv = ConvUnit(channels, channels, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        out: Tensor = self.conv(self.reduce(x))
        return x + out if self.shortcut else out


def detections(boxes: Tensor, scores: Tensor) -> Detections:
    """The best class of each box, thinned by non-maximum suppression within the classes.

    Args:
        boxes: xyxy in pixels, within the image, [B, n, 4].
        scores: Of each class, 0 to 1, [B, n, classes].

    Returns:
        For each image `boxes`, `scores` and `labels` (from 1), the best first.
    """
    from torchvision.ops import batched_nms  # 1 s to import

    best, labels = scores.max(2)
    found = []
    for box, score, label in zip(boxes, best, labels, strict=True):
        order = score.argsort(descending=True, stable=True)[:MAX_CANDIDATES]
        order = order[score[order] > MIN_SCORE]
        kept = order[batched_nms(box[order], score[order], label[order], NMS_IOU)]
        kept = kept[:MAX_DETECTIONS]
        found.append({"boxes": box[kept], "scores": score[kept], "labels": label[kept] + 1})
    return found


def complete_iou(first: Tensor, second: Tensor) -> Tensor:
    """CIoU of pairs of boxes: Zheng et al. 2020, arXiv:1911.08287, eqs. 7 to 11.

    Args:
        first: xyxy, [..., 4].
        second: Likewise; the shapes broadcast.

    Returns:
        IoU less the distance of the centres and the difference of the shapes, at most 1.
    """
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    both = (high - low).clamp(min=0).prod(-1)
    sides_a, sides_b = first[..., 2:] - first[..., :2], second[..., 2:] - second[..., :2]
    iou = both / (sides_a.prod(-1) + sides_b.prod(-1) - both + 1e-7)
    hull = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(
        first[..., :2], second[..., :2]
    )
    centres = first[..., :2] + first[..., 2:] - second[..., :2] - second[..., 2:]
    distance = centres.square().sum(-1) / 4 / (hull.square().sum(-1) + 1e-7)
    angles = [torch.atan2(sides[..., 0], sides[..., 1] + 1e-7) for sides in (sides_a, sides_b)]
    shape = 4 / math.pi**2 * (angles[0] - angles[1]).square()
    with torch.no_grad():
        weight = shape / (1 - iou + shape + 1e-7)
    return iou - distance - weight * shape


def cell_centres(maps: Sequence[Tensor], strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Centres of the cells of all levels, row by row.

    Args:
        maps: [B, C, h, w] of each level.
        strides: Pixels between cells.

    Returns:
        x and y in pixels [n, 2], and the stride of each [n, 1].
    """
    points, steps = [], []
    for level, stride in zip(maps, strides, strict=True):
        height, width = level.shape[-2:]
        rows, columns = torch.meshgrid(
            torch.arange(height, device=level.device),
            torch.arange(width, device=level.device),
            indexing="ij",
        )
        centres = (torch.stack([columns, rows], -1).view(-1, 2) + 0.5) * stride
        points.append(centres.to(level.dtype))
        steps.append(torch.full_like(points[-1][:, :1], stride))
    return torch.cat(points), torch.cat(steps)


def prior_bias(probability: float) -> float:
    """The bias whose sigmoid is `probability`."""
    return -math.log((1 - probability) / probability)


def scaled(channels: int, width: float) -> int:
    """A width times a factor, rounded up to a multiple of 8."""
    return math.ceil(channels * width / 8) * 8


def doubled(x: Tensor) -> Tensor:
    """Twice the height and width, each pixel four times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def check_input(images: Tensor, targets: Targets | None, *, training: bool) -> None:
    """Refuses images that cannot be halved five times, and training without targets.

    Raises:
        ValueError: Naming the key.
    """
    if images.shape[-1] % 32 or images.shape[-2] % 32:
        raise ValueError(
            f"`data.image_size` (={list(images.shape[-2:])}) must be a multiple of 32: the levels "
            "of this detector are halved five times. Change it."
        )
    if training and targets is None:
        raise ValueError("`targets` must be given in train mode: losses compare with them.")


def clipped(boxes: Tensor, image_size: Sequence[int]) -> Tensor:
    """Boxes xyxy [..., 4] within an image of (height, width)."""
    height, width = image_size
    limit = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limit)
