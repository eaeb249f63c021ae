"""Semantic segmentation: cross entropy of pixels, mean intersection over union."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.image_data import ImageData
from ..data.masks import IGNORED
from ..options import Bounds
from ..outputs import main_output, unwrapped
from .images import ImageTask

AUXILIARY = "aux"
"""What torchvision's models call the logits of their auxiliary head."""


class SegmentationTask(ImageTask):
    """Batches, loss and metrics of a segmentation data set.

    The model returns logits [B, num_classes, H, W] at the size of the images, or a mapping with
    them as `out`, and those of an auxiliary head as `aux`.

    Args:
        data: The data set; its labels are masks, uint8 [N, H, W], 255 where nothing is said.
        batch_size: Images in a batch.
        calibration_size: Images of the calibration split.
        seed: Chooses the calibration split.
        device: Where the images and masks, and the models to come, live.
        class_weights: `balanced` weighs a class by median frequency / its frequency in the
            training images that have it (Eigen and Fergus 2015, arXiv:1411.4734, section 6.3.2,
            as SegNet does).
        aux_weight: Weight of the auxiliary head's loss.
        max_scale: Training images are magnified by a factor between 1 / max_scale and max_scale.
    """

    name = "segmentation"
    metric = "mIoU"

    def __init__(
        self,
        data: ImageData,
        *,
        batch_size: int = 128,
        calibration_size: int = 512,
        seed: int = 0,
        device: str | torch.device = "cpu",
        class_weights: Literal["none", "balanced"] = "none",
        aux_weight: Annotated[float, Bounds(0, 10)] = 0.4,
        max_scale: Annotated[float, Bounds(1, 8)] = 2.0,
    ) -> None:
        super().__init__(
            data,
            batch_size=batch_size,
            calibration_size=calibration_size,
            seed=seed,
            device=device,
        )
        self._aux_weight, self._max_scale = aux_weight, max_scale
        self._weights: Tensor | None = None
        if class_weights == "balanced":
            self._weights = balanced_weights(self.data.train.labels, self.num_classes)

    def training_loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of the pixels, a scalar; the model stays in its mode."""
        return self.loss(model(images), targets)

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        """Mean cross entropy of the pixels that have a class, the auxiliary head's added.

        Args:
            output: What the model returned.
            targets: int64 [B, H, W].
        """
        loss = _mean_cross_entropy(main_output(output), targets, self._weights)
        if isinstance(output, Mapping) and AUXILIARY in output:
            auxiliary = _mean_cross_entropy(output[AUXILIARY], targets, self._weights)
            loss = loss + self._aux_weight * auxiliary
        return loss

    def meter(self) -> SegmentationMeter:
        """A new meter of intersection over union, pixel accuracy and loss."""
        return SegmentationMeter(self.num_classes, self._weights, self.device)

    def misfit(self, output: Any, images: Tensor) -> str | None:
        """What the model should return for `images`; None if `output` is that."""
        logits = unwrapped(output)
        shape = (len(images), self.num_classes, *images.shape[2:])
        if isinstance(logits, Tensor) and logits.shape == shape:
            return None
        return f"logits [batch, {', '.join(map(str, shape[1:]))}], alone or as `out`,"

    def supports(self, method: str) -> None:
        """Every method makes sense on segmentation; FGP differentiates once for each class."""

    def _augmented(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        flip = self.data.horizontal_flip
        return scale_and_crop(images, labels, generator, max_scale=self._max_scale, flip=flip)

    def _targets(self, labels: Tensor) -> Tensor:
        return labels.long()


class SegmentationMeter:
    """Counts of (class, predicted class) over all pixels, and the loss.

    Args:
        num_classes: Classes.
        weights: Of the classes in the loss, [num_classes], or None.
        device: Of the outputs.
    """

    def __init__(
        self,
        num_classes: int,
        weights: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._num_classes, self._weights = num_classes, weights
        self._counts = torch.zeros(num_classes**2, dtype=torch.int64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._weight = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, output: Any, targets: Tensor, /) -> None:
        """Takes in a model's output for targets [B, H, W]."""
        logits = main_output(output)
        known = targets != IGNORED
        places = targets[known] * self._num_classes + logits.argmax(1)[known]
        self._counts += torch.bincount(places, minlength=self._num_classes**2)
        loss, weight = _cross_entropy(logits, targets, self._weights)
        self._loss += loss
        self._weight += weight

    def compute(self) -> dict[str, float]:
        """Mean intersection over union, mean cross entropy, pixel accuracy.

        Returns:
            `accuracy`: the mean over the classes that occur in the masks of (pixels of the class
            that are predicted as it) / (pixels that are of it or predicted as it).
            `loss`. `pixel_accuracy`: the share of the pixels with a class that are right.
        """
        counts = self._counts.view(self._num_classes, self._num_classes).double()
        right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        present = true > 0
        union = (true + predicted - right)[present]
        return {
            "accuracy": float((right[present] / union).mean()) if len(union) else math.nan,
            "loss": float(self._loss / self._weight),
            "pixel_accuracy": float(right.sum() / true.sum()),
        }


def balanced_weights(masks: Tensor, num_classes: int) -> Tensor:
    """Median frequency balancing: the weight of each class in the loss, [num_classes].

    A class's frequency is its share of the pixels of the images that have it. A class without a
    pixel has weight 1: no pixel uses it.

    Args:
        masks: uint8 [N, H, W].
        num_classes: Classes.
    """
    pixels = torch.zeros(num_classes, dtype=torch.float64)
    of_images = torch.zeros_like(pixels)
    for mask in masks:
        counts = torch.bincount(mask.flatten().long(), minlength=256)[:num_classes].cpu()
        pixels += counts
        of_images += (counts > 0) * mask.numel()
    present = pixels > 0
    frequency = pixels[present] / of_images[present]
    weights = torch.ones(num_classes)
    weights[present] = (frequency.median() / frequency).float()
    return weights.to(masks.device)


def scale_and_crop(
    images: Tensor, masks: Tensor, generator: torch.Generator, *, max_scale: float, flip: bool
) -> tuple[Tensor, Tensor]:
    """Magnifies, shifts and mirrors each image and its mask alike, at the same size.

    The factor is log-uniform. Where the image does not reach, it is black and the mask says
    nothing.

    Args:
        images: uint8 [B, C, H, W].
        masks: uint8 [B, H, W].
        generator: Source of randomness.
        max_scale: Largest factor; the smallest is its inverse.
        flip: Whether half of them are mirrored left and right.

    Returns:
        float32 [B, C, H, W], 0..255, and uint8 [B, H, W].
    """
    drawn = torch.rand(4, len(images), generator=generator, device=generator.device)
    scale, x, y, mirror = drawn.to(images.device)
    shrink = torch.exp((1 - 2 * scale) * math.log(max_scale))  # what the image is divided by
    reach = (1 - shrink).abs()
    grid = torch.zeros(len(images), 2, 3, device=images.device)
    grid[:, 0, 0] = torch.where((mirror < 0.5) & flip, -shrink, shrink)
    grid[:, 1, 1] = shrink
    grid[:, 0, 2] = (2 * x - 1) * reach
    grid[:, 1, 2] = (2 * y - 1) * reach
    points = F.affine_grid(grid, list(images.shape), align_corners=False)
    pixels = F.grid_sample(images.float(), points, mode="bilinear", align_corners=False)
    shifted = (masks.float() + 1)[:, None]  # so that 0 is what lies outside
    labels = F.grid_sample(shifted, points, mode="nearest", align_corners=False)[:, 0]
    return pixels, torch.where(labels == 0, IGNORED, labels - 1).to(torch.uint8)


def _mean_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Zero where no pixel has a class."""
    loss, weight = _cross_entropy(logits, targets, weights)
    return loss / weight.clamp_min(torch.finfo(loss.dtype).tiny)


def _cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sum over the pixels, and the sum of their weights."""
    loss = F.cross_entropy(logits, targets, weights, ignore_index=IGNORED, reduction="sum")
    known = targets != IGNORED
    return loss, known.sum().to(loss) if weights is None else weights[targets[known]].sum().to(
        loss
    )
