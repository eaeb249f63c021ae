"""What a data set is to the search, whatever its task, and how one is registered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

ImageSize = int | tuple[int, int]  # a square's side, or (height, width)


class Data(Protocol):
    """A data set in three splits. Each task has a frozen dataclass of its own for it.

    Tensors in its fields (also in the dataclasses of the splits) reach the workers without being
    copied; everything else in them is pickled.
    """

    @property
    def name(self) -> str:
        """Name in `DATASETS`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""

    @property
    def train(self) -> Sized:
        """For training and, as its subset, for calibration."""

    @property
    def val(self) -> Sized:
        """What a search optimises on."""

    @property
    def test(self) -> Sized:
        """Read once, for the members that are exported."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel of the training images, in 0..1."""

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation, likewise."""

    @property
    def official_test(self) -> bool:
        """Whether the test split is the one that the data set comes with."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images that models get."""

    def parts(self) -> Iterator[Tensor | bytes]:
        """All that results depend on: the images and targets of train and val, and their use.

        The test split does not count: no result of a trial depends on it.
        """

    def to(self, device: torch.device | str) -> Self:
        """The same data on `device`."""


@dataclass(frozen=True)
class Request:
    """Which part of a data set is wanted, and in what form; checked already.

    Attributes:
        name: Name in `DATASETS`.
        root: Folder with the files; None for where the entry says.
        image_size: Height and width in pixels, or one number for both.
        channels: Of the images.
        split: Fractions of training, validation and test images.
        seed: Seed of the split.
        limit: Most images in train and val together.
        memory_bytes: Most that the images may take in memory.
        workers: Processes that decode what does not fit.
    """

    name: str
    root: Path | None
    image_size: ImageSize
    channels: int
    split: Sequence[float]
    seed: int
    limit: int | None
    memory_bytes: int
    workers: int

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size


@dataclass(frozen=True)
class DatasetEntry:
    """How a data set is found and what suits it.

    Attributes:
        description: One line for people.
        num_classes: None when the files say it.
        image_size: Height and width that it is read at by default, in pixels.
        where: Where its files are looked for.
        read: Root folder or None -> what `load` splits and reads; for classification (images, the
            official test images or None).
        crop_fraction: Padding of the random crops, as a fraction of the image size.
        horizontal_flip: Whether mirroring keeps the class.
        task: What it is for: a key of `TASKS`.
        load: Brings what is wanted into memory, as the task's data.
    """

    description: str
    num_classes: int | None
    image_size: ImageSize
    where: str
    read: Callable[[Path | None], Any]
    crop_fraction: float
    horizontal_flip: bool
    task: str
    load: Callable[[DatasetEntry, Request], Data]


MAX_BYTES = 4 * 2**30


def check_memory(count: int, bytes_per_image: int, request: Request) -> None:
    """Refuses more than may be in memory.

    Raises:
        ValueError: If `count` images take more than `request.memory_bytes`.
    """
    needed = count * bytes_per_image
    if needed > request.memory_bytes:
        size = request.image_size
        shown = size if isinstance(size, int) else list(size)
        form = " x ".join(map(str, (request.channels, *request.shape)))
        raise ValueError(
            f"`data.image_size` (={shown}) must let the images fit in memory: {count} images of "
            f"{form} bytes take {needed / 2**30:.1f} GiB, more than "
            f"{request.memory_bytes / 2**30:.3g} GiB. Lower it, or `data.limit`."
        )
