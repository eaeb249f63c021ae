"""The made scenes as files: in COCO's format, with boxes and masks, and in that of Cityscapes.

A folder is made once. Its name is the digest of what it is made of; it appears whole or not at
all, so that several processes may ask for it at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from .fashion_mnist import CLASSES
from .files import CACHE
from .scenes import (
    SPLITS,
    Mask,
    Pixels,
    Scene,
    SceneOptions,
    make_scenes,
    read_clothing,
    tight_box,
)

Layout = Literal["coco", "cityscapes"]

VERSION = 1  # of what the same options make
CITY = "fashion"
# Cityscapes' label ids of evaluated classes, in place of which the scenes' classes stand: `road`
# is the canvas, the others are Fashion-MNIST's classes in their order.
CANVAS_ID = 7
CLASS_IDS = (8, 11, 12, 13, 17, 19, 20, 21, 22, 23)
VOID_ID = 0  # `unlabeled`: ignored in training and evaluation


def scenes_folder(
    layout: Layout, root: Path | None = None, options: SceneOptions | None = None
) -> Path:
    """The folder with the scenes in one format; they are made if they are not there.

    coco: `images/SPLIT/NUMBER.png` and `annotations/instances_SPLIT.json` with boxes, areas and
    run-length coded masks of what one sees of each object; category ids from 1.
    cityscapes: `leftImg8bit/SPLIT/fashion/*_leftImg8bit.png` and
    `gtFine/SPLIT/fashion/*_gtFine_labelIds.png`. The canvas has the id 7 (`road`), Fashion-MNIST's
    class c has `CLASS_IDS[c]`, and the objects' blurred edges are 0 (`unlabeled`).

    Args:
        layout: The format.
        root: Where the folders are kept; by default in the cache of data sets.
        options: Which scenes.

    Returns:
        A folder in `root`, named after the options' digest.

    Raises:
        ValueError: If Fashion-MNIST is missing, or the folder cannot be written.
    """
    options = options or SceneOptions()
    parent = (CACHE.expanduser() if root is None else root) / "scenes"
    folder = parent / f"{layout}-{_digest(layout, options)}"
    if not folder.is_dir():
        write = {"coco": write_coco, "cityscapes": write_cityscapes}[layout]
        _appear(folder, lambda target: write(target, options))
    return folder


def write_coco(folder: Path, options: SceneOptions) -> None:
    """Writes all splits in COCO's format into an existing folder."""
    (folder / "annotations").mkdir()
    categories = [
        {"id": index + 1, "name": name, "supercategory": "clothing"}
        for index, name in enumerate(CLASSES)
    ]
    clothing = read_clothing()
    for split in SPLITS:
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        (folder / "images" / split).mkdir(parents=True)
        for number, scene in enumerate(make_scenes(options, split, clothing)):
            name = f"{number:06d}.png"
            _save(scene.image, folder / "images" / split / name)
            side = {"width": options.size, "height": options.size}
            images.append({"id": number + 1, "file_name": name, **side})
            annotations += _annotations(scene, number + 1, first_id=len(annotations) + 1)
        path = folder / "annotations" / f"instances_{split}.json"
        content = {"images": images, "annotations": annotations, "categories": categories}
        path.write_text(json.dumps({"info": _info(options), **content}), encoding="utf-8")


def write_cityscapes(folder: Path, options: SceneOptions) -> None:
    """Writes all splits in the format of Cityscapes into an existing folder."""
    clothing = read_clothing()
    for split in SPLITS:
        images, masks = (folder / kind / split / CITY for kind in ("leftImg8bit", "gtFine"))
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for number, scene in enumerate(make_scenes(options, split, clothing)):
            name = f"{CITY}_{number:06d}_000019"
            _save(scene.image, images / f"{name}_leftImg8bit.png")
            _save(label_ids(scene), masks / f"{name}_gtFine_labelIds.png")


def label_ids(scene: Scene) -> Pixels:
    """Cityscapes' label id of each pixel, [H, W]."""
    ids = np.array([CANVAS_ID, *(CLASS_IDS[label] for label in scene.labels)], np.uint8)
    result = ids[scene.instances]
    result[scene.edges] = VOID_ID
    return result


def run_lengths(mask: Mask) -> list[int]:
    """Lengths of the runs of equal pixels, down the columns, beginning with one of zeros."""
    pixels = mask.ravel(order="F")
    runs = [(bool(value), len(list(run))) for value, run in groupby(pixels.tolist())]
    return [length for _, length in ([(False, 0)] if runs[0][0] else []) + runs]


def _annotations(scene: Scene, image_id: int, *, first_id: int) -> Iterator[dict[str, Any]]:
    for index, label in enumerate(scene.labels):
        mask = scene.instances == index + 1
        yield {
            "id": first_id + index,
            "image_id": image_id,
            "category_id": label + 1,
            "bbox": list(tight_box(mask)),
            "area": int(mask.sum()),
            "iscrowd": 0,
            "segmentation": {"counts": run_lengths(mask), "size": list(mask.shape)},
        }


def _info(options: SceneOptions) -> dict[str, Any]:
    return {
        "description": "scenes made of Fashion-MNIST images (MIT licence, Zalando SE)",
        "version": str(VERSION),
        "options": asdict(options),
    }


def _save(pixels: Pixels, path: Path) -> None:
    Image.fromarray(pixels).save(path, compress_level=1)


def _digest(layout: Layout, options: SceneOptions) -> str:
    content = json.dumps([VERSION, layout, asdict(options)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _appear(folder: Path, write: Callable[[Path], None]) -> None:
    """Writes into a temporary folder beside the wanted one, which then takes its name."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    except OSError as error:
        raise ValueError(
            f"`data.root` (={folder.parent.parent}) must be a folder that can be written to: "
            f"{error}. Name another one."
        ) from error
    try:
        write(temporary)
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster
            raise ValueError(
                f"`data.root` (={folder.parent.parent}) must have room for the scenes: {error}. "
                "Name another folder."
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
