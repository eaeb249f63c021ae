"""Images with boxes, whatever format they come from: reading, letterboxing, one tensor a split.

The objects of an image are rows (left, top, right, bottom, label, ignored) in pixels of the
canvas; labels count from 1, and rows of zeros fill up to the image with the most objects. Ignored
objects (COCO's crowds, VOC's and DOTA's difficult ones) are not trained on and count neither as
found nor as missed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .image_data import Source

COLUMNS = 6
LABEL, IGNORED = 4, 5
DEFAULT_SIZE = 640
MIN_SIDE = 1e-2  # pixels of a box on the canvas; below, a detector's regression overflows
PAD = 114  # grey around a letterboxed image, as YOLO's papers have it
READERS = 8  # threads; decoding releases the interpreter's lock


@dataclass(frozen=True)
class BoxImage:
    """One image file, or a window of it, and its objects.

    Attributes:
        path: The file.
        size: Its width and height in pixels, as the annotations say.
        boxes: (left, top, right, bottom) in pixels of the window, float32 [n, 4].
        labels: From 1, int64 [n].
        ignored: Whether each is neither to be found nor missed, bool [n].
        window: (left, top, right, bottom) in the file; the whole file for None.
    """

    path: Path
    size: tuple[int, int]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    ignored: NDArray[np.bool_]
    window: tuple[int, int, int, int] | None = None


def box_source(classes: tuple[str, ...], images: Sequence[BoxImage]) -> Source:
    """Images that are decoded when they are read, each letterboxed to a square canvas.

    For the split, an image counts as one of its rarest class (0 without objects).

    Args:
        classes: Names; label 1 is the first.
        images: All of a split.

    Returns:
        `read` gives uint8 [n, 3, size, size], and `read_targets` float32 [n, m, 6], the rows of
        this module.
    """

    def read(indices: Tensor, size: int | None) -> Tensor:
        return _read_images([images[i] for i in indices.tolist()], size or DEFAULT_SIZE)

    def read_targets(indices: Tensor, size: int | None) -> Tensor:
        return _read_rows([images[i] for i in indices.tolist()], size or DEFAULT_SIZE)

    return Source(classes, _rarest(images), read, read_targets)


def unpack_boxes(rows: Tensor) -> list[dict[str, Tensor]]:
    """From the rows of a batch [B, m, 6] to what torchvision's detectors and metrics take.

    Returns:
        For each image `boxes` [n, 4] xyxy, `labels` int64 [n], from 1, and `iscrowd` int64 [n],
        1 where the object is ignored.
    """
    result = []
    for image in rows:
        real = image[image[:, LABEL] > 0]
        result.append(
            {
                "boxes": real[:, :4],
                "labels": real[:, LABEL].long(),
                "iscrowd": real[:, IGNORED].long(),
            }
        )
    return result


def valid_boxes(
    boxes: Sequence[Sequence[float]], width: float, height: float
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Cuts boxes at the borders of their image.

    Args:
        boxes: (left, top, right, bottom) each.
        width: Of the image, in pixels.
        height: Likewise.

    Returns:
        The boxes [n, 4], and which of them are finite and have an area there, [n].
    """
    array = np.asarray(boxes, np.float64).reshape(-1, 4)
    finite = np.all(np.isfinite(array), axis=1)
    array = np.nan_to_num(array).clip(0, [width, height, width, height])
    real = np.all(array[:, 2:] > array[:, :2], axis=1)
    return array.astype(np.float32), np.logical_and(finite, real)


def inside_folder(folder: Path, name: object, *, listed_in: Path) -> Path:
    """The file that an annotation names, which must lie in the folder of the images.

    Raises:
        ValueError: If the name is no relative path without `..`, or there is no such file.
    """
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise damaged(listed_in, f"it names an image {str(name)[:80]!r}")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise damaged(listed_in, f"it names an image outside of its folder: {name[:80]!r}")
    path = folder / name
    if not path.is_file():
        raise damaged(listed_in, f"it names an image that is not there: {path}")
    return path


def damaged(path: Path, reason: str) -> ValueError:
    """The error of a file of annotations that cannot be used."""
    return ValueError(
        f"`data.root` (={path}) must hold readable annotations: {reason}. Correct the file, or "
        "fetch it again."
    )


def letterbox(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """Where an image lies on a square canvas: its own shape, as large as fits, in the middle.

    Returns:
        (left, top, width, height) on the canvas, in pixels.
    """
    scale = size / max(width, height)
    wide, high = max(1, round(width * scale)), max(1, round(height * scale))
    return (size - wide) // 2, (size - high) // 2, wide, high


def _rarest(images: Sequence[BoxImage]) -> Tensor:
    counts = Counter(int(label) for image in images for label in image.labels)
    return torch.tensor(
        [min(image.labels.tolist(), key=lambda n: (counts[n], n), default=0) for image in images],
        dtype=torch.int64,
    )


def _read_images(images: Sequence[BoxImage], size: int) -> Tensor:
    """uint8 [N, 3, size, size]."""
    result = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor(READERS) as pool:
        for index, pixels in enumerate(pool.map(lambda image: _decode(image, size), images)):
            result[index] = torch.from_numpy(pixels).permute(2, 0, 1)
    return result


def _decode(image: BoxImage, size: int) -> NDArray[np.uint8]:
    """[size, size, 3]."""
    try:
        with Image.open(image.path) as file:
            if file.size != image.size:
                raise ValueError(
                    f"it has {file.size} pixels, and the annotations say {image.size}"
                )
            if image.window is None:
                file.draft("RGB", (2 * size, 2 * size))  # JPEG decodes at a fraction of its size
            picture = file.convert("RGB")
    except Exception as error:  # of a damaged image a decoder raises nearly anything
        raise ValueError(
            f"`data.root` (={image.path}) must hold readable images: {error}. Replace or delete "
            "the file."
        ) from error
    if image.window is not None:
        picture = picture.crop(image.window)
    left, top, wide, high = letterbox(*_extent(image), size)
    canvas = Image.new("RGB", (size, size), (PAD, PAD, PAD))
    if picture.size != (wide, high):
        picture = picture.resize((wide, high), Image.Resampling.BILINEAR)
    canvas.paste(picture, (left, top))
    return np.array(canvas)


def _read_rows(images: Sequence[BoxImage], size: int) -> Tensor:
    """float32 [N, m, 6]: the boxes on the canvas."""
    most = max((len(image.labels) for image in images), default=0)
    rows = np.zeros((len(images), most, COLUMNS), np.float32)
    for row, image in zip(rows, images, strict=True):
        boxes = _on_canvas(image, size)
        good = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(1)
        count = int(good.sum())
        row[:count, :4] = boxes[good]
        row[:count, LABEL] = image.labels[good]
        row[:count, IGNORED] = image.ignored[good]
    return torch.from_numpy(rows)


def _on_canvas(image: BoxImage, size: int) -> NDArray[np.float32]:
    """The boxes [n, 4] as the letterboxed image has them."""
    width, height = _extent(image)
    left, top, wide, high = letterbox(width, height, size)
    scale = np.array([wide / width, high / height] * 2, np.float32)
    return image.boxes * scale + np.array([left, top] * 2, np.float32)


def _extent(image: BoxImage) -> tuple[int, int]:
    """Width and height of what is shown of a file."""
    left, top, right, bottom = image.window or (0, 0, *image.size)
    return right - left, bottom - top
