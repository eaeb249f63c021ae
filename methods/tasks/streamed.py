"""Image classification on data that stay on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..data.split import stratified_subset
from ..data.streamed import FileSplit, StreamedData, batches, read_all
from .classification import ClassificationTask, calibration_indices
from .images import SplitName, check_max_images, check_sizes

QUICK_IMAGES = 2048  # of the validation split, where its figures need not be exact


class StreamedTask(ClassificationTask):
    """As `ClassificationTask`, over images that are decoded again for each pass.

    The calibration images are kept in memory. The split `quick`, a stratified part of val, stands
    for it where many models are compared. Training images are cropped at random (Szegedy et al.
    2015) and mirrored.

    Args:
        data: The data set.
        batch_size: Images in a batch.
        calibration_size: Images of the calibration split.
        seed: Chooses the calibration split and `quick`.
        device: Where the batches, and the models to come, live.
    """

    quick_split: SplitName = "quick"

    def __init__(
        self,
        data: StreamedData,
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
        self._disk = data
        self.data = data  # type: ignore[assignment]  # what ImageTask does with it is replaced
        chosen = calibration_indices(data.train.labels, calibration_size, seed)
        part = data.train.take(chosen)
        self._stored = read_all(part, data.size, data.channels).to(self.device), part.labels
        generator = torch.Generator().manual_seed(seed)
        quick = stratified_subset(data.val.labels, QUICK_IMAGES, generator)
        self._files: dict[str, FileSplit] = {
            "train": data.train,
            "val": data.val,
            "test": data.test,
            "quick": data.val.take(quick),
        }
        self._set_normalisation(data.mean, data.std)

    def train_batches(
        self,
        generator: torch.Generator,
        *,
        max_images: int | None = None,
        augment: bool = True,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of shuffled training batches; a last batch of one image is dropped.

        Args:
            generator: Source of the order and of the augmentation.
            max_images: Shortens the epoch to this many images, at least 2.
            augment: Random crops, and flips where they suit the data.

        Yields:
            (images, labels): float32 [B, C, H, W] and int64 [B], on the device.

        Raises:
            ValueError: If `max_images` is below 2.
        """
        check_max_images(max_images)
        count = self.num_train
        order = torch.randperm(count, generator=generator, device=generator.device)
        seeds = None
        if augment:
            drawn = torch.randint(2**62, (count,), generator=generator, device=generator.device)
            seeds = drawn.cpu()
        parts = torch.split(order[:max_images].cpu(), self.batch_size)
        yield from self._read("train", [part for part in parts if len(part) > 1], seeds)

    def batches(
        self, split: SplitName, *, batch_size: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All images of a split in order, not augmented; see `ImageTask`."""
        size = batch_size or self.batch_size
        if split != "calibration":
            indices = torch.arange(len(self._files[split]))
            yield from self._read(split, torch.split(indices, size))
            return
        images, labels = self._stored
        parts = zip(torch.split(images, size), torch.split(labels, size), strict=True)
        for one, classes in parts:
            yield self._normalise(one), classes.to(self.device)

    def size(self, split: SplitName) -> int:
        """Images in a split."""
        return len(self._stored[1]) if split == "calibration" else len(self._files[split])

    def example_input(self, batch_size: int = 1) -> Tensor:
        """Normalised calibration images, [batch_size, C, H, W], repeated where too few."""
        images = self._stored[0]
        return self._normalise(images[torch.arange(batch_size, device=self.device) % len(images)])

    def _read(
        self, split: str, order: Sequence[Tensor], seeds: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        pin = self.device.type == "cuda"
        read = batches(self._files[split], self._disk, order, seeds=seeds, pin=pin)
        for images, labels in read:
            images = images.to(self.device, non_blocking=True)
            yield self._normalise(images), labels.to(self.device, non_blocking=True)
