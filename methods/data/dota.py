"""Data sets in the format of DOTA: Xia et al. 2018, arXiv:1711.10241; boxes at any angle.

The images are larger than what a detector takes, so they are cut into tiles. A detector of
upright boxes learns the upright box around each oriented one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image

from .boxes import BoxImage, box_source, damaged, inside_folder, valid_boxes
from .image_data import Source

TILE, OVERLAP = 1024, 200  # pixels, as DOTA's development kit cuts
MIN_INSIDE = 0.7  # share of an object in a tile, below which it is ignored there
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
MAX_BYTES = 2**26  # of one text file

Corners = NDArray[np.float64]  # [n, 4, 2]: x and y of the corners in order, in pixels


@dataclass(frozen=True)
class OrientedImage:
    """One large image and its objects.

    Attributes:
        path: The file.
        size: Width and height in pixels.
        corners: [n, 4, 2].
        names: Class of each object.
        difficult: Whether each is neither to be found nor missed.
    """

    path: Path
    size: tuple[int, int]
    corners: Corners
    names: tuple[str, ...]
    difficult: tuple[bool, ...]


def read_dota(root: Path | None) -> tuple[Source, Source | None]:
    """Tiles of the images in `train/images/`, with the boxes of `train/labelTxt/`.

    `val/` is the test split where it is there: DOTA keeps its test boxes to itself. Classes are
    the names that occur, in alphabetical order.

    Args:
        root: The folder with `train/`.

    Returns:
        (tiles to train and validate on, official test tiles or None).

    Raises:
        ValueError: If files are missing or damaged.
    """
    if root is None or not (root / "train" / "labelTxt").is_dir():
        raise ValueError(
            f"`data.root` (={root}) must be a folder in DOTA's format: it holds train/images/ and "
            "train/labelTxt/. Set it."
        )
    train = read_oriented(root / "train")
    held_out = read_oriented(root / "val") if (root / "val" / "labelTxt").is_dir() else []
    classes = tuple(sorted({name for image in [*train, *held_out] for name in image.names}))
    if not classes:
        raise damaged(root / "train" / "labelTxt", "no image has an object")

    def source(images: Sequence[OrientedImage]) -> Source:
        return box_source(classes, [tile for image in images for tile in tiles(image, classes)])

    return source(train), source(held_out) if held_out else None


def read_oriented(folder: Path) -> list[OrientedImage]:
    """All images of one split: `images/` and `labelTxt/`.

    Raises:
        ValueError: If files are missing or damaged.
    """
    paths = sorted((folder / "labelTxt").glob("*.txt"))
    if not paths:
        raise damaged(folder / "labelTxt", "there are no text files")
    return [_read(folder, path) for path in paths]


def rotated_iou(first: Corners, second: Corners) -> NDArray[np.float64]:
    """Intersection over union of all pairs of oriented boxes.

    Args:
        first: [n, 4, 2], corners in order, either way round.
        second: [m, 4, 2].

    Returns:
        [n, m], 0 to 1; 0 where a box has no area or its edges cross.
    """
    a, b = (shapely.polygons(corners.reshape(-1, 4, 2)) for corners in (first, second))
    good = (shapely.is_valid(a) & (shapely.area(a) > 0))[:, None] & (
        shapely.is_valid(b) & (shapely.area(b) > 0)
    )
    result = np.zeros(good.shape)
    rows, columns = np.nonzero(good)
    both = shapely.area(shapely.intersection(a[rows], b[columns]))
    result[rows, columns] = both / (shapely.area(a)[rows] + shapely.area(b)[columns] - both)
    return result


def upright(corners: Corners) -> Corners:
    """The smallest upright box around each oriented one: (left, top, right, bottom), [n, 4]."""
    return np.concatenate([corners.min(1), corners.max(1)], 1)


def tiles(
    image: OrientedImage, classes: Sequence[str], *, side: int = TILE, overlap: int = OVERLAP
) -> Iterator[BoxImage]:
    """Windows of an image that cover it, each with the objects that reach into it.

    Args:
        image: The image.
        classes: All names; label 1 is the first.
        side: Height and width of a window in pixels; a smaller image is one window.
        overlap: Pixels that neighbours share, at least.

    Yields:
        Windows; an object of which less than `MIN_INSIDE` lies in one is ignored there.
    """
    shapes = shapely.polygons(image.corners.reshape(-1, 4, 2))
    areas = shapely.area(shapes)
    labels = np.array([classes.index(name) + 1 for name in image.names], np.int64)
    difficult = np.array(image.difficult, np.bool_)
    for left, right in _windows(image.size[0], side, overlap):
        for top, bottom in _windows(image.size[1], side, overlap):
            share = shapely.area(
                shapely.intersection(shapes, shapely.box(left, top, right, bottom))
            )
            share = share / np.maximum(areas, 1e-9)
            moved = upright(image.corners) - [left, top, left, top]
            boxes, good = valid_boxes(moved.tolist(), right - left, bottom - top)
            good &= share > 0
            yield BoxImage(
                path=image.path,
                size=image.size,
                boxes=boxes[good],
                labels=labels[good],
                ignored=(difficult | (share < MIN_INSIDE))[good],
                window=(left, top, right, bottom),
            )


def _windows(length: int, side: int, overlap: int) -> list[tuple[int, int]]:
    """Equally spread windows of one side that cover 0 to `length`."""
    if length <= side:
        return [(0, length)]
    count = math.ceil((length - overlap) / (side - overlap))
    starts = np.linspace(0, length - side, count).round().astype(int)
    return [(int(start), int(start) + side) for start in starts]


def _read(folder: Path, path: Path) -> OrientedImage:
    names = [f"{path.stem}{extension}" for extension in EXTENSIONS]
    name = next((n for n in names if (folder / "images" / n).is_file()), names[0])
    image = inside_folder(folder / "images", name, listed_in=path)
    corners, classes, difficult = [], [], []
    for number, line in enumerate(_lines(path), 1):
        if line and not line.startswith(("imagesource:", "gsd:")):
            try:
                points, label, hard = _parse(line)
            except (ValueError, OverflowError) as error:
                raise damaged(path, f"line {number}: {str(error)[:100]}") from error
            corners.append(points)
            classes.append(label)
            difficult.append(hard)
    points_of_all = np.array(corners, np.float64).reshape(-1, 4, 2)
    good = shapely.is_valid(shapely.polygons(points_of_all)) if len(points_of_all) else []
    kept = [i for i, fine in enumerate(good) if fine]
    return OrientedImage(
        path=image,
        size=_image_size(image),
        corners=points_of_all[kept],
        names=tuple(classes[i] for i in kept),
        difficult=tuple(difficult[i] for i in kept),
    )


def _lines(path: Path) -> list[str]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES // 2**20} MiB")
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)[:200]) from error


def _parse(line: str) -> tuple[list[list[float]], str, bool]:
    """`x1 y1 x2 y2 x3 y3 x4 y4 category difficult`; the last may be missing."""
    words = line.split()
    if len(words) not in (9, 10):
        raise ValueError("it must hold eight numbers, a class and whether it is difficult")
    numbers = [float(word) for word in words[:8]]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("its corners must be finite")
    pairs = [numbers[i : i + 2] for i in range(0, 8, 2)]
    return pairs, words[8], len(words) == 10 and words[9] != "0"


def _image_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as file:
            width, height = file.size
    except Exception as error:  # of a damaged image a decoder raises nearly anything
        raise ValueError(
            f"`data.root` (={path}) must hold readable images: {error}. Replace or delete the "
            "file."
        ) from error
    return width, height
