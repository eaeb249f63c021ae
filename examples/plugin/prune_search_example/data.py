"""A data set: a function without arguments that returns what `own_images` returns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from prunesearch.methods.data import DatasetEntry, own_images

SIZE, COUNT = 8, 400
CLASSES = ("dark", "bright left", "bright right", "bright")


def read_squares(root: Path | None) -> tuple[Tensor, Tensor, Sequence[str]]:
    """Drawn here; yours are read from `root`, which is `data.root` of the config.

    Returns:
        uint8 images [N, C, H, H], int64 classes [N], and the names of the classes.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(COUNT) % len(CLASSES)
    images = torch.randint(0, 120, (COUNT, 1, SIZE, SIZE), generator=generator)
    images[labels % 2 == 1, :, :, : SIZE // 2] += 80
    images[labels >= 2, :, :, SIZE // 2 :] += 80
    return images.to(torch.uint8), labels, CLASSES


def squares() -> DatasetEntry:
    """400 grey squares of four kinds."""
    return own_images(read_squares, description="400 grey squares of four kinds", image_size=SIZE)
