"""The segmentation part of Pascal VOC 2012. Everingham et al. 2015."""

from __future__ import annotations

from pathlib import Path

from .masks import MaskFiles, Pair, folder_of, pair_up

CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
)
# 255 is the outline of an object: it is ignored.


def read_voc_masks(root: Path | None) -> MaskFiles:
    """The lists in `ImageSets/Segmentation/`, `JPEGImages/` and the masks in `SegmentationClass/`.

    The masks of VOC's own test split are not public: its val split is the test split, and val is
    taken from train.

    Args:
        root: The folder `VOC2012`, or one that holds it as `VOCdevkit/VOC2012`.

    Raises:
        ValueError: If a folder or list is missing, or an image has no mask.
    """
    marks = ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")
    folder = folder_of(root, ("VOC2012", "VOCdevkit/VOC2012"), marks)
    ids = {label: label for label in range(len(CLASSES))}
    return MaskFiles(CLASSES, ids, _pairs(folder, "train"), None, _pairs(folder, "val"))


def _pairs(folder: Path, name: str) -> list[Pair]:
    path = folder / "ImageSets" / "Segmentation" / f"{name}.txt"
    try:
        stems = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"`data.root` (={path}) must list the images of {name}: {error}. Restore the file."
        ) from error
    masks = {f"{mask.stem}.jpg": mask for mask in (folder / "SegmentationClass").glob("*.png")}
    images = [folder / "JPEGImages" / f"{stem}.jpg" for stem in stems]
    strangers = [image for image in images if image.parent.name != "JPEGImages"]
    if strangers or not all(image.is_file() for image in images):
        lost = (strangers or [image for image in images if not image.is_file()])[0]
        raise ValueError(
            f"`data.root` (={lost}) must hold the images that {path.name} names: this one is "
            "missing. Restore it."
        )
    return pair_up(images, masks, path.name)
