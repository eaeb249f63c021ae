"""What a data set is to the rest of the package: tensors of small images, in three splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 4096  # images converted at a time, which bounds the memory of the float copies


@dataclass(frozen=True)
class Split:
    """Images and what is to be learnt of them.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: Classes, int64 [N]; for detection boxes, float32 [N, m, 6] (see boxes.py).
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """The same split on `device`."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageData:
    """A data set in memory.

    Attributes:
        name: Name in `DATASETS`.
        classes: Class names; a label is an index into them.
        train: For training and, as its subset, for calibration.
        val: What a search optimises on.
        test: Read once, for the members that are exported.
        mean: Mean of each channel of the training images, in 0..1.
        std: Standard deviation, likewise.
        crop_padding: Pixels of zero padding for the random crops that suit this data set.
        horizontal_flip: Whether a mirrored image is still one of its class.
        official_test: Whether the test split is the one that the data set comes with.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    horizontal_flip: bool
    official_test: bool

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def parts(self) -> Iterator[Tensor | bytes]:
        """All that results depend on: images and labels of train and val, and their use."""
        for split in (self.train, self.val):
            yield split.images
            yield split.labels
        facts = (len(self.classes), self.mean, self.std, self.crop_padding, self.horizontal_flip)
        yield repr(facts).encode()

    def to(self, device: torch.device | str) -> ImageData:
        """The same data on `device`."""
        return dataclasses.replace(
            self,
            train=self.train.to(device),
            val=self.val.to(device),
            test=self.test.to(device),
        )


@dataclass(frozen=True)
class Source:
    """Images that are read only once it is known which of them are wanted.

    Attributes:
        classes: Class names.
        labels: Class of every image, int64 [N]; the splits keep its proportions.
        read: (indices, image size or None for the native one) -> uint8 [n, C, H, W].
        read_targets: (indices, image size) -> what is to be learnt of each image, where that is
            more than a class: masks or boxes, [n, ...].
        paths: Of the images' files, where each has one and nothing but a class is learnt.
    """

    classes: tuple[str, ...]
    labels: Tensor
    read: Callable[[Tensor, int | None], Tensor]
    read_targets: Callable[[Tensor, int | None], Tensor] | None = None
    paths: tuple[Path, ...] | None = None

    def targets(self, indices: Tensor, size: int | None) -> Tensor:
        """What is to be learnt of each image: its class, or masks or boxes, [n, ...]."""
        if self.read_targets is None:
            return self.labels[indices]
        return self.read_targets(indices, size)


def array_source(classes: tuple[str, ...], images: Tensor, labels: Tensor) -> Source:
    """Source of images that are in memory already: uint8 [N, C, H, W] and int64 [N]."""
    return Source(classes, labels, lambda indices, size: resize(images[indices], size))


def resize(images: Tensor, size: int | None) -> Tensor:
    """Resizes square images, bilinear and antialiased.

    Args:
        images: uint8 [N, C, H, H].
        size: New height and width; None keeps them.

    Returns:
        uint8 [N, C, size, size].
    """
    if size is None or images.shape[-1] == size:
        return images
    result = images.new_empty(*images.shape[:2], size, size)
    for start in range(0, len(images), CHUNK):
        part = images[start : start + CHUNK].float()
        part = F.interpolate(part, (size, size), mode="bilinear", antialias=True)
        result[start : start + CHUNK] = part.round_().clamp_(0, 255)
    return result


def convert_channels(images: Tensor, channels: int) -> Tensor:
    """Repeats grey images to `channels`, or turns RGB into grey (weights of ITU-R BT.601).

    Args:
        images: uint8 [N, C, H, W].
        channels: Wanted channels.

    Returns:
        uint8 [N, channels, H, W].

    Raises:
        ValueError: If neither conversion applies.
    """
    native = images.shape[1]
    if native == channels:
        return images
    if native == 1:
        return images.repeat(1, channels, 1, 1)
    if native == 3 and channels == 1:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        parts = [(p.float() * weights).sum(1, keepdim=True) for p in torch.split(images, CHUNK)]
        return torch.cat([part.round_().to(torch.uint8) for part in parts])
    raise ValueError(
        f"`channels` (={channels}) must be 1 or the data's own number: the images have {native} "
        "channels, which no model with another number can take. Build the model with "
        f"in_channels: {native}."
    )


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, with pixels in 0..1.

    Args:
        images: uint8 [N, C, H, W].

    Returns:
        (mean, std), C numbers each; a constant channel's std is 1/255, never 0.
    """
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for part in torch.split(images, CHUNK):
        pixels = part.float()
        total += pixels.sum((0, 2, 3), dtype=torch.float64)
        squares += pixels.square_().sum((0, 2, 3), dtype=torch.float64)
    count = images.numel() / images.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(1.0).sqrt()
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())
