"""Image classification: cross entropy, accuracy, crops and flips."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.split import stratified_subset
from .images import ImageTask
from .meter import ClassificationMeter


class ClassificationTask(ImageTask):
    """Batches, loss and metrics of an image classification data set; see `ImageTask`."""

    name = "classification"
    metric = "top-1"

    def training_loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of a model's logits, a scalar; the model stays in its mode."""
        return self.loss(model(images), targets)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean cross entropy of logits [B, num_classes] against classes [B]."""
        return F.cross_entropy(logits, target)

    def meter(self) -> ClassificationMeter:
        """A new meter of accuracy and loss."""
        return ClassificationMeter(self.device)

    def misfit(self, output: Any, images: Tensor) -> str | None:
        """What the model should return for `images`; None if `output` is that."""
        shape = (len(images), self.num_classes)
        suits = isinstance(output, Tensor) and output.shape == shape
        return None if suits else f"logits [batch, {self.num_classes}]"

    def supports(self, method: str) -> None:
        """Every method makes sense on classification."""

    def _augmented(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        padding, flip = self.data.crop_padding, self.data.horizontal_flip
        return crop_and_flip(images, generator, padding=padding, flip=flip), labels

    def _calibration(self, labels: Tensor, size: int, seed: int) -> Tensor:
        return calibration_indices(labels, size, seed)


def calibration_indices(labels: Tensor, size: int, seed: int) -> Tensor:
    """A stratified choice of `size` training images in random order, so that batches mix classes.

    Args:
        labels: Classes of the training images, int64 [N].
        size: How many; all of them when it is not below N.
        seed: Seed of the choice.

    Returns:
        Indices, [min(size, N)].
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = stratified_subset(labels, size, generator)
    return chosen[torch.randperm(len(chosen), generator=generator)]


def crop_and_flip(
    images: Tensor, generator: torch.Generator, *, padding: int, flip: bool
) -> Tensor:
    """Shifts every image by up to `padding` pixels each way, zeros coming in, and mirrors half.

    Args:
        images: [B, C, H, W].
        generator: Source of randomness.
        padding: Largest shift in pixels.
        flip: Whether to mirror left and right.

    Returns:
        As `images`, contiguous.
    """
    count, _, height, width = images.shape
    device, source = images.device, generator.device
    shifts = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator, device=source)
    mirrored = torch.rand(count, 1, generator=generator, device=source) < 0.5 * flip
    shifts, mirrored = shifts.to(device), mirrored.to(device)
    rows = torch.arange(height, device=device) + shifts[0]
    columns = torch.arange(width, device=device)
    columns = torch.where(mirrored, columns.flip(0), columns) + shifts[1]
    padded = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)
    batch = torch.arange(count, device=device).view(-1, 1, 1)
    return padded[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
