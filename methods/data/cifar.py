"""CIFAR-10 and CIFAR-100: Krizhevsky 2009; the files of the python version."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .files import find_or_download
from .image_data import Source, array_source


@dataclass(frozen=True)
class _Layout:
    name: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels_key: str
    names_key: str


CIFAR10 = _Layout(
    name="CIFAR10",
    folder="cifar-10-batches-py",
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test="test_batch",
    meta="batches.meta",
    labels_key="labels",
    names_key="label_names",
)
CIFAR100 = _Layout(
    name="CIFAR100",
    folder="cifar-100-python",
    train=("train",),
    test="test",
    meta="meta",
    labels_key="fine_labels",
    names_key="fine_label_names",
)


def read_cifar10(root: Path | None) -> tuple[Source, Source]:
    """50,000 and 10,000 colour images of 32 x 32 pixels, 10 classes.

    Args:
        root: Folder `cifar-10-batches-py`, or the one that holds it.

    Returns:
        (training images, official test images).

    Raises:
        ValueError: If the files are missing or damaged.
    """
    return _read(CIFAR10, root)


def read_cifar100(root: Path | None) -> tuple[Source, Source]:
    """50,000 and 10,000 colour images of 32 x 32 pixels, 100 classes.

    Args:
        root: Folder `cifar-100-python`, or the one that holds it.

    Returns:
        (training images, official test images).

    Raises:
        ValueError: If the files are missing or damaged.
    """
    return _read(CIFAR100, root)


def _read(layout: _Layout, root: Path | None) -> tuple[Source, Source]:
    def download(folder: Path) -> None:
        from torchvision import datasets  # 1 s to import

        getattr(datasets, layout.name)(str(folder), download=True)

    needed = (*layout.train, layout.test, layout.meta)
    folder = find_or_download(
        root,
        name=layout.name,
        subfolders=(layout.folder,),
        complete=lambda place: all((place / file).is_file() for file in needed),
        download=download,
    )
    meta = folder / layout.meta
    names = _field(_unpickle(meta), layout.names_key, meta)
    if not isinstance(names, list) or not names:
        raise _damaged(meta, "its names of the classes are no list")
    classes = tuple(str(name) for name in names)
    train = [folder / file for file in layout.train]
    return (
        _read_batches(layout, train, classes),
        _read_batches(layout, [folder / layout.test], classes),
    )


def _read_batches(layout: _Layout, paths: Sequence[Path], classes: tuple[str, ...]) -> Source:
    images, labels = [], []
    for path in paths:
        batch = _unpickle(path)
        pixels = _field(batch, "data", path)
        targets = _field(batch, layout.labels_key, path)
        if not isinstance(targets, list) or not all(type(label) is int for label in targets):
            raise _damaged(path, "its labels are no list of numbers")
        good = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8
        if not good or not targets or pixels.shape != (len(targets), 3072):
            raise _damaged(path, "its data are not one row of 3,072 bytes a label")
        if not all(0 <= label < len(classes) for label in targets):
            raise _damaged(path, f"a label is not below {len(classes)}")
        images.append(torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32))
        labels.append(torch.tensor(targets, dtype=torch.int64))
    return array_source(classes, torch.cat(images), torch.cat(labels))


class _ArraysOnly(pickle.Unpickler):
    """Loads numpy arrays and plain containers; anything else could run code."""

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a CIFAR file")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _unpickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():  # the files are from 2009, and numpy says so
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            return _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise _damaged(path, str(error)[:200]) from error


def _field(mapping: Any, key: str, path: Path) -> Any:
    if not isinstance(mapping, dict) or key not in mapping:
        raise _damaged(path, f"it has no `{key}`")
    return mapping[key]


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"`data.root` (={path}) must hold the python version of CIFAR: {reason}. Fetch the file "
        "again."
    )
