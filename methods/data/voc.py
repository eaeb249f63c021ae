"""Data sets in the format of Pascal VOC: Everingham et al. 2010, one XML file an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from .boxes import BoxImage, box_source, damaged, inside_folder, valid_boxes
from .image_data import Source

MAX_BYTES = 2**22  # of one XML file; the real ones have a few kB
_MALFORMED = (ElementTree.ParseError, ValueError, OSError, RecursionError, OverflowError)


@dataclass(frozen=True)
class _Annotation:
    file_name: str
    size: tuple[int, int]
    boxes: list[tuple[float, float, float, float]]
    names: list[str]
    difficult: list[bool]


def read_voc(root: Path | None) -> tuple[Source, Source | None]:
    """Images of `JPEGImages/` with the boxes of `Annotations/`.

    `ImageSets/Main/` names the images: those of `test.txt` are the test split, those of
    `trainval.txt`, or of `train.txt` and `val.txt`, the pool of the others. Without `test.txt`
    the `val.txt` is the test split. Classes are the names that occur, in alphabetical order.

    Args:
        root: A folder such as `VOCdevkit/VOC2007`.

    Returns:
        (images to train and validate on, official test images or None).

    Raises:
        ValueError: If files are missing or damaged, or one of them names a file elsewhere.
    """
    if root is None or not (root / "Annotations").is_dir():
        raise ValueError(
            f"`data.root` (={root}) must be a folder in VOC's format: it holds Annotations/, "
            "JPEGImages/ and ImageSets/Main/. Set it, for example to VOCdevkit/VOC2007."
        )
    pool, held_out = _names(root)
    read = {name: _read(root, name) for name in dict.fromkeys([*pool, *held_out])}
    classes = tuple(sorted({name for image in read.values() for name in image.names}))
    if not classes:
        raise damaged(root / "Annotations", "no image has an object")

    def source(names: Sequence[str]) -> Source:
        return box_source(classes, [_image(root, name, read[name], classes) for name in names])

    return source(pool), source(held_out) if held_out else None


def _names(root: Path) -> tuple[list[str], list[str]]:
    """Names of the images to train and validate on, and of the test images."""
    lists = {name: _list(root, name) for name in ("train", "val", "trainval", "test")}
    both = lists["trainval"] or [*lists["train"], *lists["val"]]
    if lists["test"]:
        pool, held_out = both, lists["test"]
    elif lists["train"] and lists["val"]:
        pool, held_out = lists["train"], lists["val"]
    else:
        pool, held_out = both, []
    pool, held_out = list(dict.fromkeys(pool)), list(dict.fromkeys(held_out))
    if not pool:
        raise ValueError(
            f"`data.root` (={root}) must name images in ImageSets/Main/trainval.txt or train.txt: "
            "there are none. Set it to a folder in VOC's format."
        )
    if twice := set(pool) & set(held_out):
        raise ValueError(
            f"`data.root` (={root}) must hold test images that are not trained on: "
            f"{min(twice)} is in both lists. Correct ImageSets/Main."
        )
    return pool, held_out


def _list(root: Path, name: str) -> list[str]:
    path = root / "ImageSets" / "Main" / f"{name}.txt"
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)[:200]) from error
    return [line.split()[0] for line in lines if line.strip()]


def _read(root: Path, name: str) -> _Annotation:
    listed = root / "ImageSets" / "Main"
    path = inside_folder(root / "Annotations", f"{name}.xml", listed_in=listed)
    try:
        return _parse(_text(path))
    except _MALFORMED as error:
        raise damaged(path, f"{type(error).__name__}: {str(error)[:200]}") from error


def _text(path: Path) -> str:
    """The file's text. A document type is refused: its entities can be made to fill the memory."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES // 2**20} MiB")
    text = path.read_bytes().decode("utf-8")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("it declares a document type or entities")
    return text


def _parse(text: str) -> _Annotation:
    tree = ElementTree.fromstring(text)
    size = (int(_value(tree, "size/width")), int(_value(tree, "size/height")))
    if min(size) < 1:
        raise ValueError(f"its size is {size}")
    objects = tree.findall("object")
    return _Annotation(
        file_name=tree.findtext("filename", "").strip(),
        size=size,
        boxes=[_box(item) for item in objects],
        names=[_value(item, "name") for item in objects],
        difficult=[item.findtext("difficult", "0").strip() == "1" for item in objects],
    )


def _box(item: ElementTree.Element) -> tuple[float, float, float, float]:
    """Corners from 0; VOC counts pixels from 1, the last one included."""
    left, top, right, bottom = (
        float(_value(item, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")
    )
    return left - 1, top - 1, right, bottom


def _value(item: ElementTree.Element, key: str) -> str:
    value = item.findtext(key, "").strip()
    if not value:
        raise ValueError(f"it has no {key}")
    return value


def _image(root: Path, name: str, read: _Annotation, classes: Sequence[str]) -> BoxImage:
    listed = root / "Annotations" / f"{name}.xml"
    file_name = read.file_name or f"{name}.jpg"
    labels = [classes.index(n) + 1 for n in read.names]
    boxes, good = valid_boxes(read.boxes, *read.size)
    return BoxImage(
        path=inside_folder(root / "JPEGImages", file_name, listed_in=listed),
        size=read.size,
        boxes=boxes[good],
        labels=np.array(labels, np.int64)[good],
        ignored=np.array(read.difficult, np.bool_)[good],
    )
