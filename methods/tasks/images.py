"""Batches of a data set in memory: what the tasks on images have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.image_data import ImageData, Split
from ..trace import evaluating
from .meter import Meter

SplitName = Literal["train", "val", "test", "calibration", "quick"]


class ImageTask:
    """Batches and evaluation; a task adds its loss, its meter and its augmentation.

    The images go to the device once, as uint8; a batch is a slice of them, normalised to float32.

    Args:
        data: The data set.
        batch_size: Images in a batch, at least 2 (batch norm cannot train on one).
        calibration_size: Images of the calibration split, at most as many as there are to train.
        seed: Chooses the calibration split.
        device: Where the images, and the models to come, live.

    Attributes:
        quick_split: What stands for val where many models are compared.

    Raises:
        ValueError: If a size is too small.
    """

    quick_split: SplitName = "val"

    def __init__(
        self,
        data: ImageData,
        *,
        batch_size: int = 128,
        calibration_size: int = 512,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        check_sizes(batch_size, calibration_size)
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.num_classes = len(data.classes)
        self.num_train = len(data.train)
        chosen = self._calibration(data.train.labels.cpu(), calibration_size, seed)
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
        self._set_normalisation(data.mean, data.std)

    def train_batches(
        self,
        generator: torch.Generator,
        *,
        max_images: int | None = None,
        augment: bool = True,
    ) -> Iterator[tuple[Tensor, Any]]:
        """One epoch of shuffled training batches; a last batch of one image is dropped.

        Args:
            generator: Source of the order and of the augmentation. On the CPU it gives the same
                batches whatever the device.
            max_images: Shortens the epoch to this many images, at least 2.
            augment: Random changes that suit the data.

        Yields:
            (images, targets): float32 [B, C, H, W] and what the task learns, on the device.

        Raises:
            ValueError: If `max_images` is below 2.
        """
        check_max_images(max_images)
        train = self._splits["train"]
        order = torch.randperm(len(train), generator=generator, device=generator.device)
        order = order[:max_images].to(self.device)
        for indices in torch.split(order, self.batch_size):
            if len(indices) < 2:
                return
            images, labels = train.images[indices], train.labels[indices]
            if augment:
                images, labels = self._augmented(images, labels, generator)
            yield self._normalise(images), self._targets(labels)

    def calibration_batches(self) -> list[tuple[Tensor, Any]]:
        """The calibration split: a fixed part of train, not augmented, shuffled.

        Returns:
            (images, targets): float32 [B, C, H, W] and what the task learns, on the device.
        """
        return list(self.batches("calibration"))

    def example_input(self, batch_size: int = 1) -> Tensor:
        """Normalised calibration images, [batch_size, C, H, W], repeated where too few."""
        images = self._splits["calibration"].images
        indices = torch.arange(batch_size, device=self.device) % len(images)
        return self._normalise(images[indices])

    def batches(
        self, split: SplitName, *, batch_size: int | None = None
    ) -> Iterator[tuple[Tensor, Any]]:
        """All images of a split in order, not augmented.

        Args:
            split: Which images.
            batch_size: Images at a time; the task's own by default.

        Yields:
            (images, targets): float32 [B, C, H, W] and what the task learns, on the device.
        """
        chosen = self._splits[split]
        size = batch_size or self.batch_size
        for images, labels in zip(
            torch.split(chosen.images, size), torch.split(chosen.labels, size), strict=True
        ):
            yield self._normalise(images), self._targets(labels)

    def size(self, split: SplitName) -> int:
        """Images in a split."""
        return len(self._splits[split])

    def evaluate(
        self,
        model: nn.Module,
        split: SplitName = "val",
        *,
        batch_size: int | None = None,
    ) -> dict[str, float]:
        """Evaluates in eval mode and restores every module's mode.

        Args:
            model: On the task's device.
            split: Which images.
            batch_size: Images at a time; the task's own by default.

        Returns:
            `accuracy`, a fraction, `loss`, and the task's further figures.
        """
        meter = self.meter()
        with evaluating(model), torch.inference_mode():
            for images, targets in self.batches(split, batch_size=batch_size):
                meter.update(model(images), targets)
        return meter.compute()

    def meter(self) -> Meter:
        """A new meter of a model's outputs."""
        raise NotImplementedError

    def _augmented(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A random version of uint8 images and of what is learnt of them."""
        raise NotImplementedError

    def _targets(self, labels: Tensor) -> Any:
        """What is stored of a batch, in the form that the loss takes."""
        return labels

    def _calibration(self, labels: Tensor, size: int, seed: int) -> Tensor:
        """Indices of the calibration images, in random order, [min(size, N)]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(labels), generator=generator)[:size]

    def _set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        deviation = torch.tensor(std, device=self.device).view(-1, 1, 1)
        self._scale = 1 / (255 * deviation)
        self._shift = torch.tensor(mean, device=self.device).view(-1, 1, 1) / deviation

    def _normalise(self, images: Tensor) -> Tensor:
        """(x / 255 - mean) / std, float32; float images are overwritten."""
        return images.float().mul_(self._scale).sub_(self._shift)


def check_sizes(batch_size: int, calibration_size: int) -> None:
    """Refuses a batch or a calibration split that is too small.

    Raises:
        ValueError: Naming the key.
    """
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


def check_max_images(max_images: int | None) -> None:
    """Refuses an epoch that is too short.

    Raises:
        ValueError: If it is below 2.
    """
    if max_images is not None and max_images < 2:
        raise ValueError(
            f"`max_images` (={max_images}) must be at least 2: batch norm cannot train on one "
            "image. Raise it, or leave it out for whole epochs."
        )
