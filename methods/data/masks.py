"""Images with masks, whatever format they come from: splits, reading, resizing.

A mask says the class of every pixel; 255 where nothing is said: such pixels are neither learnt nor
evaluated.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from .entry import DatasetEntry, Request, check_memory
from .image_data import ImageData, Split, channel_statistics, convert_channels

IGNORED = 255
READERS = 8  # threads; decoding releases the interpreter's lock
LEAST = 2  # training images: batch norm cannot train on one

Pixels = NDArray[np.uint8]
Pair = tuple[Path, Path]  # an image and its mask


@dataclass(frozen=True)
class MaskFiles:
    """The files of a data set, by the splits that it comes with.

    Attributes:
        classes: Class names.
        ids: Pixel value in the mask files -> class; every other value is ignored.
        train: Images and masks.
        val: Likewise; None to take it from `train`.
        test: Likewise; None to take it from `train`.
    """

    classes: tuple[str, ...]
    ids: Mapping[int, int]
    train: Sequence[Pair]
    val: Sequence[Pair] | None = None
    test: Sequence[Pair] | None = None


def load_masks(entry: DatasetEntry, request: Request) -> ImageData:
    """Reads images and masks into memory, each fitted into the wanted size.

    The splits that the data set comes with stay; the others are drawn from its training images.

    Returns:
        The data; the labels of a split are its masks, uint8 [N, H, W].

    Raises:
        ValueError: If files are missing or unreadable, or a split would be empty.
    """
    files: MaskFiles = entry.read(request.root)
    parts = _split(files, request)
    count = sum(map(len, parts.values()))
    height, width = request.shape
    check_memory(count, (request.channels + 1) * height * width, request)
    train, val, test = (_read_split(pairs, files.ids, request) for pairs in parts.values())
    mean, std = channel_statistics(train.images)
    return ImageData(
        name=request.name,
        classes=files.classes,
        train=train,
        val=val,
        test=test,
        mean=mean,
        std=std,
        crop_padding=0,
        horizontal_flip=entry.horizontal_flip,
        official_test=files.test is not None,
    )


def folder_of(root: Path | None, default: Sequence[str], marks: Sequence[str]) -> Path:
    """The folder that holds a data set: the root, or a folder of that name in it.

    Without a root, $PRUNE_SEARCH_DATA is searched.

    Args:
        root: The user's folder.
        default: Where in it the files may be.
        marks: Folders that show that it is the right one.

    Raises:
        ValueError: If it is not there.
    """
    variable = os.environ.get("PRUNE_SEARCH_DATA")
    place = root or (Path(variable).expanduser() if variable else None)
    for folder in [place, *(place / name for name in default)] if place else []:
        if folder is not None and all((folder / mark).is_dir() for mark in marks):
            return folder
    raise ValueError(
        f"`data.root` (={root}) must be the folder of the data set: it holds no "
        f"{' and '.join(marks)}. Set it to where they are."
    )


def pair_up(images: Sequence[Path], mask_of: Mapping[str, Path], name: str) -> list[Pair]:
    """Images with their masks, by the name that both have in common.

    Args:
        images: The image files.
        mask_of: Name of an image's file -> mask.
        name: Of the split, for messages.

    Raises:
        ValueError: If there is no image, or one has no mask.
    """
    if not images:
        raise ValueError(f"`data.root` must hold images in {name}: it has none. Add them.")
    missing = [path for path in images if path.name not in mask_of]
    if missing:
        raise ValueError(
            f"`data.root` (={missing[0]}) must have a mask for every image: {len(missing)} of "
            f"{name} have none. Add them, or take the images away."
        )
    return [(path, mask_of[path.name]) for path in images]


def read_pair(pair: Pair, shape: tuple[int, int], table: Pixels) -> tuple[Pixels, Pixels]:
    """An image and its mask, scaled alike to fit into `shape`, in the middle.

    Args:
        pair: The files.
        shape: (height, width); what the image does not cover is black, and ignored.
        table: Class of each pixel value in the mask's file, [256].

    Returns:
        uint8 [H, W, 3] and uint8 [H, W].

    Raises:
        ValueError: If a file cannot be read, or the two differ in size.
    """
    image, mask = _open(pair[0], "RGB"), open_mask(pair[1])
    if image.size != mask.size:
        raise ValueError(
            f"`data.root` (={pair[1]}) must be as large as its image: the mask has "
            f"{mask.size[0]} x {mask.size[1]} pixels, the image {image.size[0]} x "
            f"{image.size[1]}. Replace one of them."
        )
    height, width = shape
    scale = min(height / image.height, width / image.width)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    place = np.s_[top : top + size[1], left : left + size[0]]
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[place] = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    labels = np.full((height, width), IGNORED, np.uint8)
    labels[place] = table[np.asarray(mask.resize(size, Image.Resampling.NEAREST))]
    return pixels, labels


def class_table(ids: Mapping[int, int]) -> Pixels:
    """Class of each pixel value in a mask's file, [256]."""
    table = np.full(256, IGNORED, np.uint8)
    for value, label in ids.items():
        table[value] = label
    return table


def _read_split(pairs: Sequence[Pair], ids: Mapping[int, int], request: Request) -> Split:
    height, width = request.shape
    images = torch.empty(len(pairs), 3, height, width, dtype=torch.uint8)
    masks = torch.empty(len(pairs), height, width, dtype=torch.uint8)
    table = class_table(ids)
    with ThreadPoolExecutor(READERS) as pool:
        read = pool.map(lambda pair: read_pair(pair, request.shape, table), pairs)
        for index, (pixels, labels) in enumerate(read):
            images[index] = torch.from_numpy(pixels).permute(2, 0, 1)
            masks[index] = torch.from_numpy(labels)
    return Split(convert_channels(images, request.channels), masks)


def _split(files: MaskFiles, request: Request) -> dict[str, Sequence[Pair]]:
    """Images of train, val and test; drawn ones keep the order of the files."""
    generator = torch.Generator().manual_seed(request.seed)
    train, val, test = files.train, files.val, files.test
    of_train, of_val, of_test = request.split
    if test is None:
        share = of_test if val is None else of_test / (of_train + of_test)
        train, test = _draw(train, round(share * len(train)), generator)
    if val is None:
        count = round(of_val / (of_train + of_val) * len(train))
        train, val = _draw(train, count, generator)
    limit = request.limit
    if limit is not None and limit < len(train) + len(val):
        keep = max(1, round(limit * len(val) / (len(train) + len(val))))
        _, val = _draw(val, keep, generator)
        _, train = _draw(train, max(0, limit - keep), generator)
    parts = {"train": train, "val": val, "test": test}
    for name, pairs in parts.items():
        if len(pairs) < (LEAST if name == "train" else 1):
            raise ValueError(
                f"`data.split` (={list(request.split)}) must leave images in every split: {name} "
                f"has {len(pairs)}. Use more images (`data.limit`) or other fractions."
            )
    return parts


def _draw(
    pairs: Sequence[Pair], count: int, generator: torch.Generator
) -> tuple[list[Pair], list[Pair]]:
    """(those left, `count` of them at random), each in order."""
    taken = set(torch.randperm(len(pairs), generator=generator)[:count].tolist())
    left = [pair for index, pair in enumerate(pairs) if index not in taken]
    return left, [pairs[index] for index in sorted(taken)]


def _open(path: Path, mode: str) -> Image.Image:
    try:
        with Image.open(path) as file:
            return file.convert(mode)
    except Exception as error:  # of a damaged image a decoder raises nearly anything
        raise _unreadable(path, error) from error


def open_mask(path: Path) -> Image.Image:
    """A mask's own pixel values, one byte each: a palette is not looked up.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        with Image.open(path) as file:
            if file.mode not in ("L", "P"):
                raise ValueError(f"its pixels are {file.mode}, and a mask has one byte each")
            file.load()
            return Image.fromarray(np.asarray(file))
    except Exception as error:  # of a damaged image a decoder raises nearly anything
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"`data.root` (={path}) must hold readable images: {error}. Replace or delete the file."
    )
