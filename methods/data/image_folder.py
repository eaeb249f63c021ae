"""A user's own images: one folder a class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .image_data import Source

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"})
EXTENSIONS |= {".webp"}
DEFAULT_SIZE = 224
LONGEST = 100  # the longer side in units of the shorter one, which becomes the image size
READERS = 8  # threads; decoding releases the interpreter's lock


def read_image_folder(root: Path | None) -> tuple[Source, Source | None]:
    """Images in `root/CLASS/`, or in `root/train/CLASS/` and `root/test/CLASS/` (or `val/`).

    Args:
        root: The folder.

    Returns:
        (images, images of the test folder or None). They are decoded when read: RGB, the shorter
        side resized to the image size, the centre cropped.

    Raises:
        ValueError: If the root is missing, holds no classes, or a class has no image.
    """
    if root is None or not root.is_dir():
        raise ValueError(
            f"`data.root` (={root}) must be a folder: image_folder reads the images in its class "
            "folders. Set it to a folder with one subfolder a class, or with train/ and test/."
        )
    if not (root / "train").is_dir():
        return _source(root, _class_names(root)), None
    held_out = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if len(held_out) > 1:
        warnings.warn(
            f"{held_out[1]} is not read: {held_out[0]} is the test split, and the validation "
            "split is taken from train/.",
            stacklevel=2,
        )
    classes = _class_names(root / "train")
    train = _source(root / "train", classes)
    if not held_out:
        return train, None
    if _class_names(held_out[0]) != classes:
        raise ValueError(
            f"`data.root` (={root}) must hold the same classes in train/ and in "
            f"{held_out[0].name}/: {_difference(classes, _class_names(held_out[0]))}. Make the "
            "class folders the same."
        )
    return train, _source(held_out[0], classes)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    if len(names) < 2:
        raise ValueError(
            f"`data.root` (={folder}) must hold at least two class folders: it has {len(names)}. "
            "Put the images in one subfolder a class."
        )
    return tuple(names)


def _source(folder: Path, classes: tuple[str, ...]) -> Source:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in EXTENSIONS)
        if not files:
            raise ValueError(
                f"`data.root` (={folder}) must hold images in every class folder: {name}/ has "
                f"none ({', '.join(sorted(EXTENSIONS))}). Add images or delete the folder."
            )
        paths += files
        labels += [label] * len(files)

    def read(indices: Tensor, image_size: int | None) -> Tensor:
        return _read_images([paths[i] for i in indices.tolist()], image_size or DEFAULT_SIZE)

    return Source(classes, torch.tensor(labels), read, paths=tuple(paths))


def _read_images(paths: Sequence[Path], size: int) -> Tensor:
    """uint8 [N, 3, size, size]."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor(READERS) as pool:
        for index, pixels in enumerate(pool.map(lambda path: decode(path, size), paths)):
            images[index] = torch.from_numpy(pixels).permute(2, 0, 1)
    return images


def decode(path: Path, size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """[size, size, 3]: the shorter side resized to `size`, then the centre."""
    image = open_image(path, 2 * size)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def open_image(path: Path, at_least: int) -> Image.Image:
    """An image in RGB.

    Args:
        path: The file.
        at_least: Pixels a side that suffice: JPEG decodes at a fraction of its size.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        with Image.open(path) as file:
            file.draft("RGB", (at_least, at_least))
            image = file.convert("RGB")
        if max(image.size) >= LONGEST * min(image.size):
            raise ValueError(f"one side is {LONGEST} times the other or more")
    except Exception as error:  # of a damaged image a decoder raises nearly anything
        raise ValueError(
            f"`data.root` (={path}) must hold readable images: {error}. Replace or "
            "delete the file."
        ) from error
    return image


def _difference(train: tuple[str, ...], test: tuple[str, ...]) -> str:
    only_train, only_test = (
        sorted(set(train) - set(test)),
        sorted(set(test) - set(train)),
    )
    return f"only in train {only_train}, only in the other {only_test}"
