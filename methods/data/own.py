"""A user's own images as a data set: what `data.name: module:callable` or a plug-in returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .entry import DatasetEntry
from .image_data import Source, array_source
from .in_memory import load_in_memory

Read = Callable[[Path | None], tuple[Tensor, Tensor, Sequence[str]]]


def own_images(
    read: Read,
    *,
    description: str,
    image_size: int,
    where: str = "data.root",
    crop_fraction: float = 1 / 8,
    horizontal_flip: bool = False,
) -> DatasetEntry:
    """A data set for classification from a function that reads it.

    Args:
        read: `data.root` or None -> (uint8 images [N, C, H, H], int64 classes [N], class names).
        description: One line for people.
        image_size: Height and width that it is read at by default, in pixels.
        where: Where its files are looked for.
        crop_fraction: Padding of the random crops, as a fraction of the image size.
        horizontal_flip: Whether mirroring keeps the class.

    Returns:
        The entry; splits, resizing and channels are this package's matter.
    """

    def source(root: Path | None) -> tuple[Source, None]:
        images, labels, classes = read(root)
        _check(images, labels, classes)
        return array_source(tuple(map(str, classes)), images, labels), None

    return DatasetEntry(
        description=description,
        num_classes=None,
        image_size=image_size,
        where=where,
        read=source,
        crop_fraction=crop_fraction,
        horizontal_flip=horizontal_flip,
        task="classification",
        load=load_in_memory,
    )


def _check(images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(
            f"`images` (={images.dtype} {list(images.shape)}) must be uint8 [N, C, H, H]: the "
            "data set's own function returned them. Correct it."
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"`labels` (={labels.dtype} {list(labels.shape)}) must be int64 [{len(images)}], one "
            "for each image: the data set's own function returned them. Correct it."
        )
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= len(classes):
        raise ValueError(
            f"`labels` must be indices into the {len(classes)} classes, of at least one image: "
            "the data set's own function returned them. Correct it."
        )
