"""Fashion-MNIST: Xiao et al. 2017, arXiv:1708.07747; files in the idx format of MNIST."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .files import find_or_download
from .image_data import Source, array_source

CLASSES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
IDX_UBYTE = 0x08
MAX_BYTES = 2**30  # of one unzipped file; the real ones have 47 MB


def read_fashion_mnist(root: Path | None) -> tuple[Source, Source]:
    """60,000 and 10,000 grey images of 28 x 28 pixels.

    Args:
        root: Folder with the four idx files, plain or gzipped.

    Returns:
        (training images, official test images).

    Raises:
        ValueError: If the files are missing or damaged.
    """
    folder = find_or_download(
        root,
        name="Fashion-MNIST",
        subfolders=("fashion-mnist", "FashionMNIST/raw"),
        complete=lambda place: all(_path(place, f) for pair in FILES.values() for f in pair),
        download=_download,
        system=(DEBIAN,),
    )
    return _read_split(folder, "train"), _read_split(folder, "test")


def read_idx(path: Path) -> Tensor:
    """Reads an idx file of unsigned bytes, plain or (.gz) gzipped.

    The format: two zero bytes, the type, the number of dimensions, each dimension as a big-endian
    uint32, then the data.

    Args:
        path: The file.

    Returns:
        uint8 tensor of the shape in the file.

    Raises:
        ValueError: If the file is damaged or holds something else.
    """
    try:
        raw = _unzipped(path) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, num_dims = struct.unpack_from(">HBB", raw)
        shape = struct.unpack_from(f">{num_dims}I", raw, 4)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise _damaged(path, str(error)) from error
    if zeros != 0 or kind != IDX_UBYTE:
        raise _damaged(path, "it is not an idx file of unsigned bytes")
    data = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * num_dims)
    if len(data) != math.prod(shape):
        raise _damaged(path, f"it has {len(data)} bytes of data for the shape {list(shape)}")
    return torch.from_numpy(data.copy()).view(shape)


def _unzipped(path: Path) -> bytes:
    """At most `MAX_BYTES`: a small file can be made to hold more than any memory."""
    with gzip.open(path) as file:
        return file.read(MAX_BYTES)


def _read_split(folder: Path, split: str) -> Source:
    images_path, labels_path = (_path(folder, name) for name in FILES[split])
    assert images_path is not None and labels_path is not None
    images, labels = read_idx(images_path), read_idx(labels_path).long()
    if images.ndim != 3 or images.shape[1] != images.shape[2] or not images.numel():
        raise _damaged(images_path, f"the shape {list(images.shape)} is not [N, H, H]")
    if labels.shape != images.shape[:1] or (labels >= len(CLASSES)).any():
        raise _damaged(labels_path, f"it must hold {len(images)} labels below {len(CLASSES)}")
    return array_source(CLASSES, images.unsqueeze(1), labels)


def _path(folder: Path, name: str) -> Path | None:
    """The file, gzipped or plain, if it is there."""
    candidates = (folder / f"{name}.gz", folder / name)
    return next((path for path in candidates if path.is_file()), None)


def _download(folder: Path) -> None:
    from torchvision.datasets import FashionMNIST  # 1 s to import

    FashionMNIST(str(folder), download=True)


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"`data.root` (={path}) must hold readable idx files: {reason}. Fetch the file again."
    )
