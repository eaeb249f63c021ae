"""Scenes for detection and segmentation, made of real Fashion-MNIST images.

Pieces of clothing at several scales lie on textured canvases and cover each other in part. Every
scene has its objects' masks, from which the boxes are taken. A scene depends on its seed, split
and number only, so a larger set begins with the scenes of a smaller one. scenes_files.py writes
them in the formats of COCO and Cityscapes, and the readers of those formats read them back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_fill_holes

from .fashion_mnist import read_fashion_mnist
from .image_data import Source

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
VAL_SHARE = 6  # every 6th image of Fashion-MNIST's training split is for the val scenes
SURE, FAINT = 40, 10  # grey levels: an object's pixel, and one that may be of its edge
MIN_VISIBLE = 0.5  # share of what one sees of an object that the next one leaves
MIN_PIXELS = 16  # of a visible object
TRIES = 8  # places that are tried for an object

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Clothing = tuple[Source, Source]


@dataclass(frozen=True)
class SceneOptions:
    """Which scenes are made.

    Attributes:
        num_train: Scenes to train on.
        num_val: Scenes to validate on; their objects are in no training scene.
        num_test: Scenes of objects from Fashion-MNIST's own test split.
        size: Height and width of a canvas in pixels.
        max_objects: Most objects in a scene; there is at least one.
        seed: Decides everything.

    Raises:
        ValueError: If a number is too small.
    """

    num_train: int = 1600
    num_val: int = 400
    num_test: int = 400
    size: int = 128
    max_objects: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("num_train", "num_val", "num_test", "max_objects"):
            if not 1 <= getattr(self, field) <= 10**6:
                raise ValueError(
                    f"`{field}` (={getattr(self, field)}) must be between 1 and 1,000,000: every "
                    "split needs scenes, and every scene objects. Correct it."
                )
        if self.max_objects > 100:
            raise ValueError(
                f"`max_objects` (={self.max_objects}) must be at most 100: more find no place in "
                "a scene. Lower it."
            )
        if not 32 <= self.size <= 4096:
            raise ValueError(
                f"`size` (={self.size}) must be between 32 and 4096: the smallest objects have a "
                "sixth of it. Use 128."
            )

    def count(self, split: SplitName) -> int:
        """Scenes of one split."""
        return {"train": self.num_train, "val": self.num_val, "test": self.num_test}[split]


@dataclass(frozen=True)
class Scene:
    """A canvas with objects.

    Attributes:
        image: [H, W, 3].
        instances: Which object each pixel shows, from 1; 0 for the canvas, [H, W].
        labels: Class of each object, an index into `CLASSES`, [n].
        edges: Pixels that may or may not belong to the object beside them, [H, W].
    """

    image: Pixels
    instances: Pixels
    labels: tuple[int, ...]
    edges: Mask


def read_clothing() -> Clothing:
    """Fashion-MNIST, which the objects are taken from: its own train and test split.

    Raises:
        ValueError: If its files are missing or damaged.
    """
    return read_fashion_mnist(None)


def make_scenes(
    options: SceneOptions, split: SplitName, clothing: Clothing | None = None
) -> Iterator[Scene]:
    """The scenes of one split, one after the other.

    Args:
        options: Which scenes.
        split: Of them.
        clothing: From `read_clothing`, which else is called.

    Raises:
        ValueError: If the files of Fashion-MNIST are missing or damaged.
    """
    images, labels = _sprites(clothing or read_clothing(), split)
    for number in range(options.count(split)):
        rng = np.random.default_rng([options.seed, SPLITS.index(split), number])
        yield _scene(images, labels, rng, options)


def _sprites(clothing: Clothing, split: SplitName) -> tuple[Pixels, NDArray[np.int64]]:
    """Images [N, 28, 28] and classes [N] that the objects of a split are taken from."""
    train, test = clothing
    source = test if split == "test" else train
    indices = torch.arange(len(source.labels))
    if split != "test":
        indices = indices[(indices % VAL_SHARE == 0) == (split == "val")]
    images = source.read(indices, None)[:, 0]
    return images.numpy(), source.labels[indices].numpy()


def _scene(
    images: Pixels, labels: NDArray[np.int64], rng: np.random.Generator, options: SceneOptions
) -> Scene:
    size = options.size
    canvas = _texture(rng, size)
    instances = np.zeros((size, size), np.uint8)
    edges = np.zeros((size, size), np.bool_)
    placed: list[int] = []
    for _ in range(int(rng.integers(1, options.max_objects + 1))):
        chosen = int(rng.integers(len(images)))
        if _place(images[chosen], canvas, instances, edges, len(placed) + 1, rng):
            placed.append(int(labels[chosen]))
    return Scene(canvas, instances, tuple(placed), edges)


def _texture(rng: np.random.Generator, size: int) -> Pixels:
    """Coloured noise of three grains, [size, size, 3]."""
    canvas = np.broadcast_to(rng.uniform(40, 160, 3), (size, size, 3)).copy()
    for cells, strength in ((3, 40.0), (8, 25.0), (24, 15.0)):
        grain = rng.uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
        canvas += (_resize(grain, size).astype(np.float64) / 255 - 0.5) * 2 * strength
    return canvas.clip(0, 255).astype(np.uint8)


def _place(
    sprite: Pixels,
    canvas: Pixels,
    instances: Pixels,
    edges: Mask,
    number: int,
    rng: np.random.Generator,
) -> bool:
    """Paints one object where enough of the others stays visible; whether there was a place."""
    size = len(canvas)
    side = round(size * float(np.exp(rng.uniform(np.log(1 / 6), np.log(1 / 2)))))
    grey = _resize(sprite[:, ::-1] if rng.random() < 0.5 else sprite, side)
    shape = binary_fill_holes(grey >= SURE)
    tint = rng.uniform(0.35, 1.0, 3)
    for _ in range(TRIES):
        top, left = (int(n) for n in rng.integers(0, size - side + 1, 2))
        window = np.s_[top : top + side, left : left + side]
        if shape.sum() < MIN_PIXELS or _hides(instances, window, shape):
            continue
        canvas[window][shape] = (grey[shape][:, None] * tint).astype(np.uint8)
        instances[window][shape] = number
        edges[window] &= ~shape
        edges[window] |= (grey >= FAINT) & (instances[window] == 0)
        return True
    # The first object of a scene lies on an empty canvas: only a blank image finds no place.
    return False


def _hides(instances: Pixels, window: tuple[slice, slice], shape: Mask) -> bool:
    """Whether an object in the window would cover too much of one that is there.

    At most half of what is left of it may go, and not below the fewest pixels.
    """
    before = np.bincount(instances.ravel(), minlength=256)[1:]
    covered = np.bincount(instances[window][shape], minlength=256)[1:]
    left = before - covered
    return bool(
        (covered > 0).any()
        and ((left < before * MIN_VISIBLE) | (left < MIN_PIXELS))[covered > 0].any()
    )


def _resize(pixels: Any, side: int) -> Pixels:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.array(image.resize((side, side), Image.Resampling.BILINEAR))


def tight_box(mask: Mask) -> tuple[int, int, int, int]:
    """Left, top, width and height of the pixels of a mask [H, W], which has some."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top
