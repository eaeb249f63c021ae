"""Data sets by name, whole in memory, in three seeded and stratified splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..names import unknown_name
from .cifar import read_cifar10, read_cifar100
from .digits import read_digits
from .fashion_mnist import read_fashion_mnist
from .image_data import (
    ImageData,
    Source,
    Split,
    channel_statistics,
    convert_channels,
)
from .image_folder import read_image_folder
from .split import check_fractions, stratified_split, stratified_subset

__all__ = [
    "DATASETS",
    "DatasetEntry",
    "ImageData",
    "Split",
    "load_data",
    "normalise_name",
]

MAX_BYTES = 4 * 2**30


@dataclass(frozen=True)
class DatasetEntry:
    """How a data set is found and what suits it.

    Attributes:
        description: One line for people.
        num_classes: None when the files say it.
        image_size: Height and width that it is read at by default, in pixels.
        where: Where its files are looked for.
        read: Root folder or None -> (images, the official test images or None).
        crop_fraction: Padding of the random crops, as a fraction of the image size.
        horizontal_flip: Whether mirroring keeps the class.
    """

    description: str
    num_classes: int | None
    image_size: int
    where: str
    read: Callable[[Path | None], tuple[Source, Source | None]]
    crop_fraction: float
    horizontal_flip: bool


DATASETS: dict[str, DatasetEntry] = {
    "digits": DatasetEntry(
        description="1,797 handwritten digits, grey, from scikit-learn",
        num_classes=10,
        image_size=8,
        where="inside scikit-learn",
        read=read_digits,
        crop_fraction=1 / 16,
        horizontal_flip=False,
    ),
    "fashion_mnist": DatasetEntry(
        description="70,000 pieces of clothing, grey",
        num_classes=10,
        image_size=28,
        where="data.root, $PRUNE_SEARCH_DATA, Debian's dataset-fashion-mnist, or a download",
        read=read_fashion_mnist,
        crop_fraction=1 / 16,
        horizontal_flip=True,
    ),
    "cifar10": DatasetEntry(
        description="60,000 photographs of 10 classes, colour",
        num_classes=10,
        image_size=32,
        where="data.root, $PRUNE_SEARCH_DATA, or a download",
        read=read_cifar10,
        crop_fraction=1 / 8,
        horizontal_flip=True,
    ),
    "cifar100": DatasetEntry(
        description="60,000 photographs of 100 classes, colour",
        num_classes=100,
        image_size=32,
        where="data.root, $PRUNE_SEARCH_DATA, or a download",
        read=read_cifar100,
        crop_fraction=1 / 8,
        horizontal_flip=True,
    ),
    "image_folder": DatasetEntry(
        description="your own images, one folder a class",
        num_classes=None,
        image_size=224,
        where="data.root: class folders, or train/ and test/ (or val/) that hold class folders",
        read=read_image_folder,
        crop_fraction=1 / 8,
        horizontal_flip=True,
    ),
}


def normalise_name(name: str) -> str:
    """`fashion-mnist` and `fashion_mnist` are one name.

    Raises:
        ValueError: If no data set has the name.
    """
    key = name.replace("-", "_")
    if key not in DATASETS:
        raise ValueError(unknown_name("data.name", name, DATASETS))
    return key


def load_data(
    name: str,
    *,
    root: str | Path | None = None,
    image_size: int | None = None,
    channels: int = 3,
    split: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    limit: int | None = None,
) -> ImageData:
    """Reads a data set into memory.

    A data set's own test split stays the test split; `split[0] : split[1]` then divides the rest.

    Args:
        name: One of `DATASETS`.
        root: Folder with the files; by default where the data set's entry says.
        image_size: Height and width in pixels; by default the data set's own.
        channels: Channels of the images: grey is repeated, RGB is turned into grey for 1.
        split: Fractions of training, validation and test images.
        seed: Seed of the split.
        limit: Most images in train and val together, for quick runs; test stays whole.

    Returns:
        The data; the same arguments give the same data on every machine.

    Raises:
        ValueError: If an argument is wrong, or the files are missing or unreadable.
    """
    name = normalise_name(name)
    entry = DATASETS[name]
    check_fractions(split)
    size = _check_size(image_size, entry.image_size)
    pool, official_test = entry.read(None if root is None else Path(root).expanduser())
    train_at, val_at, test_at = _split_indices(
        pool, split, seed=seed, limit=limit, official=official_test is not None
    )
    tests = pool
    if official_test is not None:
        tests, test_at = official_test, torch.arange(len(official_test.labels))
    _check_memory(len(train_at) + len(val_at) + len(test_at), channels, size)

    def take(source: Source, indices: Tensor) -> Split:
        images = convert_channels(source.read(indices, size), channels)
        return Split(images, source.targets(indices, size))

    train = take(pool, train_at)
    mean, std = channel_statistics(train.images)
    return ImageData(
        name=name,
        classes=pool.classes,
        train=train,
        val=take(pool, val_at),
        test=take(tests, test_at),
        mean=mean,
        std=std,
        crop_padding=round(size * entry.crop_fraction),
        horizontal_flip=entry.horizontal_flip,
        official_test=official_test is not None,
    )


def _split_indices(
    pool: Source,
    split: Sequence[float],
    *,
    seed: int,
    limit: int | None,
    official: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of train, val and test; those of an official test split are not in the pool."""
    generator = torch.Generator().manual_seed(seed)
    labels = pool.labels
    num_classes = len(pool.classes)
    rest, test = stratified_split(labels, 0.0 if official else split[2], generator)
    if limit is not None:
        if limit < 2 * num_classes:
            raise ValueError(
                f"`data.limit` (={limit}) must be at least {2 * num_classes}: each of the "
                f"{num_classes} classes needs images to train and to validate on. Raise it."
            )
        rest = rest[stratified_subset(labels[rest], limit, generator)]
    train_in, val_in = stratified_split(labels[rest], split[1] / (split[0] + split[1]), generator)
    train, val = rest[train_in], rest[val_in]
    parts = {"train": train, "val": val} | ({} if official else {"test": test})
    for part, indices in parts.items():
        every = pool.read_targets is not None or len(torch.unique(labels[train])) == num_classes
        if len(indices) == 0 or (part == "train" and not every):
            raise ValueError(
                f"`data.split` (={list(split)}) must leave images in every split, and every class "
                f"in train: {part} is short with {len(rest)} images of {num_classes} classes to "
                "train and validate on. Use more images (`data.limit`) or other fractions."
            )
    return train, val, test


def _check_size(image_size: int | None, default: int) -> int:
    if image_size is not None and image_size < 1:
        raise ValueError(
            f"`data.image_size` (={image_size}) must be at least 1: it is the height and width in "
            f"pixels. Use {default}, or leave it out."
        )
    return default if image_size is None else image_size


def _check_memory(count: int, channels: int, size: int) -> None:
    needed = count * channels * size * size
    if needed > MAX_BYTES:
        raise ValueError(
            f"`data.image_size` (={size}) must let the images fit in memory: {count} images of "
            f"{channels} x {size} x {size} bytes take {needed / 2**30:.1f} GiB, more than "
            f"{MAX_BYTES / 2**30:.0f} GiB. Lower it, or `data.limit`."
        )
