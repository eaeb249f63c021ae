"""Cityscapes, and other data in its format. Cordts et al. 2016, arXiv:1604.01685."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .fashion_mnist import CLASSES as OBJECTS
from .masks import MaskFiles, Pair, folder_of, open_mask, pair_up

IMAGE_END, MASK_END = "_leftImg8bit.png", "_gtFine_labelIds.png"

TRAIN_IDS = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
    19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle",
    33: "bicycle",
}  # fmt: skip
"""The label ids that are evaluated, in the order of their train ids."""


def read_cityscapes(root: Path | None) -> MaskFiles:
    """Images in `leftImg8bit/SPLIT/CITY/`, label ids in `gtFine/SPLIT/CITY/`.

    The masks of Cityscapes' own test split say nothing: its val split is the test split then, and
    val is taken from train.

    Args:
        root: The folder with `leftImg8bit` and `gtFine`, or one that holds it as `cityscapes`.

    Raises:
        ValueError: If a folder is missing or an image has no mask.
    """
    folder = folder_of(root, ("cityscapes", "Cityscapes"), ("leftImg8bit", "gtFine"))
    return _files(folder, TRAIN_IDS)


def read_scenes(root: Path | None) -> MaskFiles:
    """The made scenes, which lie in this format; they are made the first time.

    Args:
        root: Where the folder of scenes is kept; None for the cache.
    """
    from .scenes_files import CANVAS_ID, CLASS_IDS, scenes_folder  # SciPy: a second to import

    names = {CANVAS_ID: "canvas"} | dict(zip(CLASS_IDS, OBJECTS, strict=True))
    return _files(scenes_folder("cityscapes", root), names)


def _files(folder: Path, names: Mapping[int, str]) -> MaskFiles:
    ids = {value: label for label, value in enumerate(names)}
    train, val = (_pairs(folder, name) for name in ("train", "val"))
    test = _pairs(folder, "test") if (folder / "leftImg8bit" / "test").is_dir() else []
    if test and _says_something(test[0][1], ids):
        return MaskFiles(tuple(names.values()), ids, train, val, test)
    return MaskFiles(tuple(names.values()), ids, train, None, val)


def _pairs(folder: Path, name: str) -> list[Pair]:
    masks = {
        path.name.removesuffix(MASK_END) + IMAGE_END: path
        for path in (folder / "gtFine" / name).glob(f"*/*{MASK_END}")
    }
    images = sorted((folder / "leftImg8bit" / name).glob(f"*/*{IMAGE_END}"))
    return pair_up(images, masks, f"leftImg8bit/{name}/")


def _says_something(mask: Path, ids: Mapping[int, int]) -> bool:
    return bool(np.isin(np.asarray(open_mask(mask)), list(ids)).any())
