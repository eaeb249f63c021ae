"""Brings a data set into memory: seeded, stratified splits of square images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .entry import Data, DatasetEntry, Request, check_memory
from .image_data import ImageData, Source, Split, channel_statistics, convert_channels
from .split import stratified_split, stratified_subset


def load_in_memory(entry: DatasetEntry, request: Request) -> Data:
    """Reads the images that are wanted; a data set's own test split stays the test split.

    Files that take more memory than they may stay on disk (`StreamedData`).

    Raises:
        ValueError: If the size is no square, or the files are missing or unreadable.
    """
    size = _square(request)
    pool, official_test = entry.read(request.root)
    train_at, val_at, test_at = _split_indices(
        pool,
        request.split,
        seed=request.seed,
        limit=request.limit,
        official=official_test is not None,
    )
    tests = pool
    if official_test is not None:
        tests, test_at = official_test, torch.arange(len(official_test.labels))
    count = len(train_at) + len(val_at) + len(test_at)
    num_bytes = request.channels * size * size
    if count * num_bytes > request.memory_bytes and pool.paths is not None:
        from .streamed import stream  # torch's loader takes a while to import

        return stream(
            request,
            pool,
            tests,
            (train_at, val_at, test_at),
            horizontal_flip=entry.horizontal_flip,
            official_test=official_test is not None,
        )
    check_memory(count, num_bytes, request)

    def take(source: Source, indices: Tensor) -> Split:
        images = convert_channels(source.read(indices, size), request.channels)
        return Split(images, source.targets(indices, size))

    train = take(pool, train_at)
    mean, std = channel_statistics(train.images)
    return ImageData(
        name=request.name,
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


def _square(request: Request) -> int:
    height, width = request.shape
    if height != width:
        raise ValueError(
            f"`data.image_size` (={[height, width]}) must be one number for "
            f"{request.name}: its images are cut to squares. Use {min(height, width)}."
        )
    return height


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
