"""Classification data that are too large for memory: images are decoded when they are wanted.

What is kept of an image is its path and its class. torch's DataLoader decodes in processes of its
own, a few batches ahead; so memory is bounded by the batches under way, whatever the data set.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .entry import Request
from .image_data import Source, channel_statistics, convert_channels
from .image_folder import decode, open_image
from .split import stratified_subset

SAMPLE = 2048  # training images that mean and standard deviation are estimated on
SAMPLE_BYTES = 2**28  # its images; as floats they take four times as much
PREFETCH = 2  # batches that each process has ready
LEAST_AREA = 0.08  # of a training crop, as Szegedy et al. 2015 (arXiv:1409.4842) have it


@dataclass(frozen=True)
class Paths:
    """Many paths in two tensors, which reach other processes without being copied.

    Attributes:
        text: All of them in UTF-8, one after the other, uint8.
        ends: Where each ends, int64 [N].
    """

    text: Tensor
    ends: Tensor

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Paths:
        """The paths, packed."""
        encoded = [os.fsencode(path) for path in paths]
        ends = torch.tensor([len(one) for one in encoded], dtype=torch.int64).cumsum(0)
        return cls(torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy()), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Path:
        start = int(self.ends[index - 1]) if index else 0
        found = self.text[start : int(self.ends[index])].numpy().tobytes()
        return Path(os.fsdecode(found))

    def take(self, indices: Tensor) -> Paths:
        """Some of them."""
        return Paths.of([self[index] for index in indices.tolist()])


@dataclass(frozen=True)
class FileSplit:
    """Files and their classes.

    Attributes:
        paths: Of the images, [N].
        labels: int64 [N].
    """

    paths: Paths
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> FileSplit:
        """Some of them."""
        return FileSplit(self.paths.take(indices), self.labels[indices])


@dataclass(frozen=True)
class StreamedData:
    """A classification data set on disk; the attributes are those of `ImageData`.

    Attributes:
        size: Height and width of the images that models get.
        channels: Of them.
        workers: Processes that decode; 0 decodes where the images are used.
    """

    name: str
    classes: tuple[str, ...]
    train: FileSplit
    val: FileSplit
    test: FileSplit
    mean: tuple[float, ...]
    std: tuple[float, ...]
    horizontal_flip: bool
    official_test: bool
    size: int
    channels: int
    workers: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.size, self.size

    def parts(self) -> Iterator[Tensor | bytes]:
        """Names, sizes in bytes and classes of the files of train and val, and their use."""
        for split in (self.train, self.val):
            for index in range(len(split)):
                path = split.paths[index]
                yield f"{path.parent.name}/{path.name} {path.stat().st_size}\n".encode()
            yield split.labels
        facts = (len(self.classes), self.mean, self.std, self.horizontal_flip, self.image_shape)
        yield repr(facts).encode()

    def to(self, device: torch.device | str) -> StreamedData:
        """Itself: the images stay on disk."""
        return dataclasses.replace(self)


def stream(
    request: Request,
    source: Source,
    tests: Source,
    indices: Sequence[Tensor],
    *,
    horizontal_flip: bool,
    official_test: bool,
) -> StreamedData:
    """The data set of files that `request` asks for.

    Args:
        request: Name, image size, channels, processes.
        source: Files of train and val.
        tests: Those of the test split.
        indices: Of train, val and test.
        horizontal_flip: Whether a mirrored image is still one of its class.
        official_test: Whether the test split came with the data set.
    """
    assert source.paths is not None and tests.paths is not None
    splits = [
        FileSplit(Paths.of([one.paths[i] for i in chosen.tolist()]), one.labels[chosen])
        for one, chosen in zip((source, source, tests), indices, strict=True)
        if one.paths is not None
    ]
    size = request.shape[0]
    fits = SAMPLE_BYTES // (3 * size * size)
    sample = stratified_subset(
        splits[0].labels, max(1, min(SAMPLE, fits)), torch.Generator().manual_seed(request.seed)
    )
    mean, std = channel_statistics(read_all(splits[0].take(sample), size, request.channels))
    return StreamedData(
        name=request.name,
        classes=source.classes,
        train=splits[0],
        val=splits[1],
        test=splits[2],
        mean=mean,
        std=std,
        horizontal_flip=horizontal_flip,
        official_test=official_test,
        size=size,
        channels=request.channels,
        workers=request.workers,
    )


def read_all(split: FileSplit, size: int, channels: int) -> Tensor:
    """Every image of a split, uint8 [N, C, size, size]; the split must be small."""
    images = torch.empty(len(split), 3, size, size, dtype=torch.uint8)
    for index in range(len(split)):
        images[index] = torch.from_numpy(decode(split.paths[index], size)).permute(2, 0, 1)
    return convert_channels(images, channels)


def batches(
    split: FileSplit,
    data: StreamedData,
    order: Sequence[Tensor],
    *,
    seeds: Tensor | None = None,
    pin: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of a split in an order, decoded ahead by processes.

    Args:
        split: The files.
        data: The data set that it belongs to.
        order: Indices of each batch.
        seeds: Of each image's augmentation, int64 [N of the split]; None for the centre.
        pin: Whether batches are put into pinned memory, from which a GPU copies while it works.

    Yields:
        uint8 [B, C, size, size] and int64 [B].
    """
    workers = min(data.workers, len(os.sched_getaffinity(0)), len(order))
    loader: DataLoader[Any] = DataLoader(
        _Files(split, data, seeds),
        batch_sampler=[indices.tolist() for indices in order],
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=pin,
        generator=torch.Generator(),  # else it would draw from the global one
    )
    yield from loader


class _Files(Dataset[tuple[Tensor, int]]):
    """Decodes one image at a time."""

    def __init__(self, split: FileSplit, data: StreamedData, seeds: Tensor | None) -> None:
        from torchvision.transforms import v2  # a second to import

        self._split, self._size, self._channels = split, data.size, data.channels
        self._seeds = seeds
        crop = v2.RandomResizedCrop(data.size, scale=(LEAST_AREA, 1.0), antialias=True)
        flips = [v2.RandomHorizontalFlip()] if data.horizontal_flip else []
        self._augment = v2.Compose([crop, *flips])

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self._split.paths[index], int(self._split.labels[index])
        if self._seeds is None:
            pixels: Any = decode(path, self._size)
        else:
            with torch.random.fork_rng(devices=[]):  # a GPU cannot be asked after a fork
                torch.default_generator.manual_seed(int(self._seeds[index]))
                pixels = np.array(self._augment(self._opened(path)))
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        return convert_channels(image[None], self._channels)[0].contiguous(), label

    def _opened(self, path: Path) -> Image.Image:
        return open_image(path, 2 * self._size)
