"""Image classification: batches on the device, cross entropy, accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.image_data import ImageData, Split
from ..data.split import stratified_subset
from ..trace import evaluating
from .meter import ClassificationMeter

SplitName = Literal["train", "val", "test", "calibration"]


class ClassificationTask:
    """Batches, loss and metrics of an image classification data set.

    The images go to the device once, as uint8; a batch is a slice of them, normalised to float32.

    Args:
        data: The data set.
        batch_size: Images in a batch, at least 2 (batch norm cannot train on one).
        calibration_size: Images of the calibration split, at most as many as there are to train.
        seed: Chooses the calibration split.
        device: Where the images, and the models to come, live.

    Raises:
        ValueError: If a size is too small.
    """

    name = "classification"
    metric = "top-1"

    def __init__(
        self,
        data: ImageData,
        *,
        batch_size: int = 128,
        calibration_size: int = 512,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        if batch_size < 2:
            raise ValueError(
                f"`data.batch_size` (={batch_size}) must be at least 2: batch norm cannot train "
                "on one image. Use 128."
            )
        if calibration_size < 1:
            raise ValueError(
                f"`calibration_size` (={calibration_size}) must be at least 1: criteria score on "
                "these images. Use 512."
            )
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.num_classes = len(data.classes)
        self.num_train = len(data.train)
        self._augmentation = (data.crop_padding, data.horizontal_flip)
        chosen = calibration_indices(data.train.labels.cpu(), calibration_size, seed)
        self.data = data = data.to(self.device)
        self._splits: dict[str, Split] = {
            "train": data.train,
            "val": data.val,
            "test": data.test,
            "calibration": Split(
                data.train.images[chosen.to(self.device)],
                data.train.labels[chosen.to(self.device)],
            ),
        }
        std = torch.tensor(data.std, device=self.device).view(-1, 1, 1)
        self._scale = 1 / (255 * std)
        self._shift = torch.tensor(data.mean, device=self.device).view(-1, 1, 1) / std

    def train_batches(
        self,
        generator: torch.Generator,
        *,
        max_images: int | None = None,
        augment: bool = True,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of shuffled training batches; a last batch of one image is dropped.

        Args:
            generator: Source of the order and of the augmentation. On the CPU it gives the same
                batches whatever the device.
            max_images: Shortens the epoch to this many images, at least 2.
            augment: Random crops with zero padding, and flips where they suit the data.

        Yields:
            (images, labels): float32 [B, C, H, W] and int64 [B], on the device.

        Raises:
            ValueError: If `max_images` is below 2.
        """
        if max_images is not None and max_images < 2:
            raise ValueError(
                f"`max_images` (={max_images}) must be at least 2: batch norm cannot train on one "
                "image. Raise it, or leave it out for whole epochs."
            )
        train = self._splits["train"]
        order = torch.randperm(len(train), generator=generator, device=generator.device)
        order = order[:max_images].to(self.device)
        for indices in torch.split(order, self.batch_size):
            if len(indices) < 2:
                return
            images = train.images[indices]
            if augment:
                padding, flip = self._augmentation
                images = crop_and_flip(images, generator, padding=padding, flip=flip)
            yield self._normalise(images), train.labels[indices]

    def calibration_batches(self) -> list[tuple[Tensor, Tensor]]:
        """The calibration split: a fixed, stratified part of train, not augmented, shuffled.

        Returns:
            (images, labels): float32 [B, C, H, W] and int64 [B], on the device.
        """
        return list(self.batches("calibration"))

    def example_input(self, batch_size: int = 1) -> Tensor:
        """Normalised calibration images, [batch_size, C, H, W], repeated where too few."""
        images = self._splits["calibration"].images
        indices = torch.arange(batch_size, device=self.device) % len(images)
        return self._normalise(images[indices])

    def training_loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of a model's logits, a scalar; the model stays in its mode."""
        return self.loss(model(images), targets)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean cross entropy of logits [B, num_classes] against classes [B]."""
        return F.cross_entropy(logits, target)

    def meter(self) -> ClassificationMeter:
        """A new meter of accuracy and loss."""
        return ClassificationMeter(self.device)

    def evaluate(
        self,
        model: nn.Module,
        split: SplitName = "val",
        *,
        batch_size: int | None = None,
    ) -> dict[str, float]:
        """Evaluates in eval mode and restores every module's mode.

        Args:
            model: Takes [B, C, H, W] to logits [B, num_classes], on the task's device.
            split: Which images.
            batch_size: Images at a time; the task's own by default.

        Returns:
            `accuracy`, a fraction, and `loss`, the mean cross entropy.
        """
        meter = self.meter()
        with evaluating(model), torch.inference_mode():
            for images, labels in self.batches(split, batch_size=batch_size):
                meter.update(model(images), labels)
        return meter.compute()

    def misfit(self, output: Any, images: Tensor) -> str | None:
        """What the model should return for `images`; None if `output` is that."""
        shape = (len(images), self.num_classes)
        suits = isinstance(output, Tensor) and output.shape == shape
        return None if suits else f"logits [batch, {self.num_classes}]"

    def supports(self, method: str) -> None:
        """Every method makes sense on classification."""

    def batches(
        self, split: SplitName, *, batch_size: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All images of a split in order, not augmented.

        Args:
            split: Which images.
            batch_size: Images at a time; the task's own by default.

        Yields:
            (images, labels): float32 [B, C, H, W] and int64 [B], on the device.
        """
        chosen = self._splits[split]
        size = batch_size or self.batch_size
        for images, labels in zip(
            torch.split(chosen.images, size), torch.split(chosen.labels, size), strict=True
        ):
            yield self._normalise(images), labels

    def _normalise(self, images: Tensor) -> Tensor:
        """(x / 255 - mean) / std, float32."""
        return images.float().mul_(self._scale).sub_(self._shift)


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
