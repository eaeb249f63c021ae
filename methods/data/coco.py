"""Data sets in COCO's format: Lin et al. 2014, arXiv:1405.0312; https://cocodataset.org/#format-data."""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .boxes import BoxImage, box_source, damaged, inside_folder, valid_boxes
from .image_data import Source

MAX_BYTES = 2 * 2**30  # of a file of annotations; COCO's largest has 0.5 GB
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


def read_coco(root: Path | None) -> tuple[Source, Source | None]:
    """Images and boxes of `annotations/instances_SPLIT.json`, with or without a year (train2017).

    The images lie in `SPLIT/`, `images/SPLIT/` or `images/`. The test split is that of
    `instances_test`; without one `instances_val` takes its place, as COCO keeps its test boxes to
    itself. Otherwise train and val are one pool, from which the validation split is taken.

    Args:
        root: The folder with `annotations/`.

    Returns:
        (images to train and validate on, official test images or None).

    Raises:
        ValueError: If files are missing or damaged, or one of them names a file elsewhere.
    """
    if root is None or not root.is_dir():
        raise ValueError(
            f"`data.root` (={root}) must be a folder in COCO's format: it holds annotations/ with "
            "instances_train.json. Set it."
        )
    files = {split: _annotations_of(root, split) for split in ("train", "val", "test")}
    if files["train"] is None:
        raise ValueError(
            f"`data.root` (={root}) must hold annotations/instances_train.json (or with a year, "
            "instances_train2017.json): there is none. Set it to a folder in COCO's format."
        )
    read = {split: _read(root, path) for split, path in files.items() if path is not None}
    classes = read["train"][0]
    for split, (names, _) in read.items():
        if names != classes:
            raise ValueError(
                f"`data.root` (={root}) must have the same categories in every file: those of "
                f"{split} differ from those of train. Correct the files."
            )
    held_out = next((split for split in ("test", "val") if split in read), None)
    pool = [image for split in read if split != held_out for image in read[split][1]]
    official = None if held_out is None else box_source(classes, read[held_out][1])
    return box_source(classes, pool), official


def read_box_scenes(root: Path | None) -> tuple[Source, Source | None]:
    """The made scenes (scenes.py), written in COCO's format and read back.

    Args:
        root: Where they are kept; by default in the cache of data sets.

    Returns:
        (images to train and validate on, test images).

    Raises:
        ValueError: If Fashion-MNIST is missing, or the folder cannot be written.
    """
    from .scenes_files import scenes_folder  # and scipy

    return read_coco(scenes_folder("coco", root))


def _annotations_of(root: Path, split: str) -> Path | None:
    found = sorted((root / "annotations").glob(f"instances_{split}*.json"))
    if len(found) > 1:
        warnings.warn(f"{found[0].name} is not read: {found[-1].name} is newer.", stacklevel=3)
    return found[-1] if found else None


def _read(root: Path, path: Path) -> tuple[tuple[str, ...], list[BoxImage]]:
    """Names of the classes, and the images of one file."""
    content = _load(path)
    try:
        categories = sorted((_whole(c["id"]), str(c["name"])) for c in content["categories"])
        numbers = {number: label + 1 for label, (number, _) in enumerate(categories)}
        objects: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
        for annotation in content["annotations"]:
            objects[_whole(annotation["image_id"])].append(annotation)
        known = [_whole(image["id"]) for image in content["images"]]
        if not categories or not known or len(set(known)) < len(known):
            raise ValueError("it must name categories and images, each image once")
        if len(numbers) < len(categories) or set(objects) - set(known):
            raise ValueError("an annotation is of an image, or of a category, that is not there")
        folder = _images_folder(root, path.stem.removeprefix("instances_"))
        images = [
            _image(image, objects[number], numbers, folder, path)
            for number, image in zip(known, content["images"], strict=True)
        ]
    except _MALFORMED as error:
        if str(error).startswith("`data.root`"):
            raise
        raise damaged(path, f"{type(error).__name__}: {str(error)[:200]}") from error
    return tuple(name for _, name in categories), images


def _load(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES // 2**30} GiB")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, str(error)[:200]) from error
    if not isinstance(content, dict):
        raise damaged(path, "it is no JSON object")
    return content


def _images_folder(root: Path, split: str) -> Path:
    places = (root / split, root / "images" / split, root / "images")
    return next((place for place in places if place.is_dir()), root)


def _image(
    image: Mapping[str, Any],
    objects: list[Mapping[str, Any]],
    numbers: Mapping[int, int],
    folder: Path,
    path: Path,
) -> BoxImage:
    width, height = _whole(image["width"]), _whole(image["height"])
    if min(width, height) < 1:
        raise ValueError(f"an image has {width} x {height} pixels")
    boxes = [_corners(annotation["bbox"]) for annotation in objects]
    labels = [numbers[_whole(annotation["category_id"])] for annotation in objects]
    crowds = [bool(annotation.get("iscrowd", 0)) for annotation in objects]
    cut, good = valid_boxes(boxes, width, height)
    return BoxImage(
        path=inside_folder(folder, image["file_name"], listed_in=path),
        size=(width, height),
        boxes=cut[good],
        labels=np.array(labels, np.int64)[good],
        ignored=np.array(crowds, np.bool_)[good],
    )


def _corners(box: Any) -> tuple[float, float, float, float]:
    """From COCO's (left, top, width, height) to (left, top, right, bottom)."""
    left, top, width, height = (float(number) for number in box)
    return left, top, left + width, top + height


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:40]!r} is no number")
    if value != int(value):
        raise ValueError(f"{value} is no whole number")
    return int(value)
