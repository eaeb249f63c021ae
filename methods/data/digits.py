"""Handwritten digits that come with scikit-learn (UCI ML repository, Alpaydin and Kaynak 1998)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from .image_data import Source, array_source


def read_digits(root: Path | None) -> tuple[Source, None]:
    """1,797 grey images of 8 x 8 pixels; there is no official test split.

    Args:
        root: Not used: the images are part of scikit-learn.

    Returns:
        (all images, None).
    """
    package = find_spec("sklearn")
    assert package is not None and package.origin is not None
    # The file alone: importing scikit-learn for it takes two seconds.
    rows = np.loadtxt(
        Path(package.origin).with_name("datasets") / "data/digits.csv.gz", delimiter=","
    )
    table = torch.from_numpy(rows)  # 64 pixels of 0..16, and the digit
    images = table[:, :-1].reshape(-1, 1, 8, 8).mul(255 / 16).round().to(torch.uint8)
    labels = table[:, -1].long()
    return array_source(tuple(str(digit) for digit in range(10)), images, labels), None
