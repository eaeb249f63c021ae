"""Handwritten digits that come with scikit-learn (UCI ML repository, Alpaydin and Kaynak 1998)."""

from __future__ import annotations

from pathlib import Path

import torch

from .image_data import Source, array_source


def read_digits(root: Path | None) -> tuple[Source, None]:
    """1,797 grey images of 8 x 8 pixels; there is no official test split.

    Args:
        root: Not used: the images are part of scikit-learn.

    Returns:
        (all images, None).
    """
    from sklearn.datasets import load_digits  # 1 s to import

    digits = load_digits()
    # The pixels are 0..16.
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    return array_source(tuple(str(digit) for digit in range(10)), images, labels), None
