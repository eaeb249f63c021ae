"""Readers of segmentation data, on small files in the formats of the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prunesearch.methods.data import DATASETS, load_data
from prunesearch.methods.data.camvid import CLASSES as CAMVID
from prunesearch.methods.data.cityscapes import TRAIN_IDS
from prunesearch.methods.data.fashion_mnist import DEBIAN
from prunesearch.methods.data.masks import IGNORED, class_table, read_pair
from prunesearch.methods.data.voc_masks import CLASSES as VOC

RNG = np.random.default_rng(0)
WIDTH, HEIGHT = 24, 16


@pytest.fixture(autouse=True)
def no_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PRUNE_SEARCH_DATA", raising=False)
    monkeypatch.setattr("prunesearch.methods.data.files.CACHE", tmp_path / "cache")


def save(array: np.ndarray, path: Path, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette:
        image.putpalette(RNG.permutation(768).astype(np.uint8).tobytes())
    image.save(path)


def photograph() -> np.ndarray:
    return RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def mask_of(values: list[int]) -> np.ndarray:
    return RNG.choice(np.array(values, np.uint8), (HEIGHT, WIDTH))


def write_camvid(root: Path, counts: dict[str, int] | None = None) -> Path:
    for name, count in (counts or {"train": 6, "val": 3, "test": 4}).items():
        for index in range(count):
            file = f"0001TP_{index:06d}.png"
            save(photograph(), root / "CamVid" / name / file)
            save(mask_of(list(range(12))), root / "CamVid" / f"{name}annot" / file)
    return root


def write_cityscapes(root: Path, *, labelled_test: bool = False) -> Path:
    for name, count in {"train": 8, "val": 3, "test": 2}.items():
        says = name != "test" or labelled_test
        for index in range(count):
            city = ("aachen", "bonn")[index % 2]
            stem = f"{city}_{index:06d}_000019"
            save(photograph(), root / "leftImg8bit" / name / city / f"{stem}_leftImg8bit.png")
            values = [*range(34)] if says else [0, 1, 2, 3]
            mask = root / "gtFine" / name / city / f"{stem}_gtFine_labelIds.png"
            save(mask_of(values), mask)
            save(mask_of([0]), mask.with_name(f"{stem}_gtFine_instanceIds.png"))
    return root


def write_voc(root: Path) -> Path:
    folder = root / "VOCdevkit" / "VOC2012"
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name, count in {"train": 7, "val": 4}.items():
        stems = [f"2007_{name}{index:04d}" for index in range(count)]
        (lists / f"{name}.txt").write_text("\n".join(stems) + "\n", encoding="utf-8")
        for stem in stems:
            save(photograph(), folder / "JPEGImages" / f"{stem}.jpg")
            values = [*range(21), 255]
            save(mask_of(values), folder / "SegmentationClass" / f"{stem}.png", palette=True)
    save(photograph(), folder / "JPEGImages" / "2008_not_listed.jpg")
    return root


WRITE = {"camvid": write_camvid, "cityscapes": write_cityscapes, "voc_segmentation": write_voc}
COUNTS = {"camvid": (6, 3, 4), "cityscapes": (7, 1, 3), "voc_segmentation": (6, 1, 4)}


def load(name: str, root: Path, **more: Any) -> Any:
    return load_data(name, root=root, **{"image_size": (HEIGHT, WIDTH), "seed": 1, **more})


@pytest.mark.parametrize("name", WRITE)
def test_contract(name: str, tmp_path: Path) -> None:
    data = load(name, WRITE[name](tmp_path))
    assert data.name == name and DATASETS[name].task == "segmentation"
    assert data.image_shape == (3, HEIGHT, WIDTH) and data.official_test
    assert len(data.classes) == DATASETS[name].num_classes == len(set(data.classes))
    assert tuple(len(getattr(data, part)) for part in ("train", "val", "test")) == COUNTS[name]
    for part in (data.train, data.val, data.test):
        assert part.images.shape == (len(part), 3, HEIGHT, WIDTH)
        assert part.labels.shape == (len(part), HEIGHT, WIDTH)
        assert part.images.dtype == part.labels.dtype == torch.uint8
        labels = set(part.labels.unique().tolist())
        assert IGNORED in labels and labels - {IGNORED} <= set(range(len(data.classes)))
    rows = [image.numpy().tobytes() for part in (data.train, data.val) for image in part.images]
    assert len(set(rows)) == len(rows)  # train and val share no image
    again, other = load(name, tmp_path), load(name, tmp_path, seed=2)
    assert torch.equal(again.train.images, data.train.images)
    if name != "camvid":  # whose three splits are its own
        assert not torch.equal(other.val.images, data.val.images)
    assert load(name, tmp_path, channels=1).image_shape == (1, HEIGHT, WIDTH)
    few = load(name, tmp_path, limit=4)
    assert len(few.train) + len(few.val) == 4 and len(few.test) == COUNTS[name][2]


def test_camvid_masks_are_read_as_they_are(tmp_path: Path) -> None:
    data = load("camvid", write_camvid(tmp_path))
    for index in range(4):
        with Image.open(tmp_path / "CamVid/testannot" / f"0001TP_{index:06d}.png") as file:
            written = np.asarray(file)
        expected = np.where(written == 11, IGNORED, written)
        assert np.array_equal(data.test.labels[index].numpy(), expected)
    assert len(CAMVID) == 11


def test_cityscapes_label_ids_become_train_ids(tmp_path: Path) -> None:
    data = load("cityscapes", write_cityscapes(tmp_path, labelled_test=True))
    assert [len(data.train), len(data.val), len(data.test)] == [8, 3, 2]  # all its own splits
    path = tmp_path / "gtFine/test/aachen/aachen_000000_000019_gtFine_labelIds.png"
    with Image.open(path) as file:
        written = np.asarray(file)
    table = {label_id: label for label, label_id in enumerate(TRAIN_IDS)}
    expected = np.vectorize(lambda value: table.get(value, IGNORED))(written)
    assert np.array_equal(data.test.labels[0].numpy(), expected)
    assert len(TRAIN_IDS) == 19 and data.classes[11] == "person" and TRAIN_IDS[24] == "person"


def test_voc_masks_are_indices_of_a_palette(tmp_path: Path) -> None:
    data = load("voc_segmentation", write_voc(tmp_path))
    folder = tmp_path / "VOCdevkit/VOC2012"
    with Image.open(folder / "SegmentationClass/2007_val0002.png") as file:
        assert file.mode == "P"
        written = np.asarray(file)
    assert np.array_equal(data.test.labels[2].numpy(), written)
    assert VOC[15] == "person" and len(VOC) == 21


def test_images_keep_their_proportions(tmp_path: Path) -> None:
    image = np.full((20, 40, 3), 200, np.uint8)
    mask = np.full((20, 40), 3, np.uint8)
    mask[:, 20:] = 5
    save(image, tmp_path / "a.png")
    save(mask, tmp_path / "b.png")
    table = class_table({3: 0, 5: 1})
    pixels, labels = read_pair((tmp_path / "a.png", tmp_path / "b.png"), (20, 20), table)
    assert (labels[:5] == IGNORED).all() and (labels[15:] == IGNORED).all()
    assert (labels[5:15, :10] == 0).all() and (labels[5:15, 10:] == 1).all()
    assert (pixels[5:15] == 200).all() and not pixels[:5].any() and not pixels[15:].any()


def test_made_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not DEBIAN.is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    from prunesearch.methods.data import scenes_files
    from prunesearch.methods.data.scenes import SceneOptions

    few = SceneOptions(num_train=6, num_val=3, num_test=2, size=48, max_objects=3)
    monkeypatch.setattr(scenes_files, "SceneOptions", lambda: few)
    data = load("scenes_segmentation", tmp_path, image_size=48)
    assert [len(data.train), len(data.val), len(data.test)] == [6, 3, 2]
    assert data.classes[0] == "canvas" and len(data.classes) == 11
    counts = torch.bincount(data.train.labels.flatten().long(), minlength=256)
    assert counts[0] > counts[1:11].sum() > 0 and not counts[11:IGNORED].any()


def first(root: Path, pattern: str) -> Path:
    return min(root.glob(pattern))


CITY_MASKS, VOC_LISTS = "gtFine/train/*/*labelIds.png", "**/ImageSets/Segmentation"
DAMAGE: dict[str, tuple[str, Any, str]] = {
    "no mask": ("camvid", lambda r: first(r, "*/valannot/*").unlink(), "have a mask"),
    "no image": ("camvid", lambda r: first(r, "*/val/*").write_bytes(b"x"), "readable"),
    "a smaller mask": (
        "cityscapes",
        lambda r: save(mask_of([7])[:8], first(r, CITY_MASKS)),
        "as large as its image",
    ),
    "a colour mask": (
        "cityscapes",
        lambda r: save(photograph(), first(r, CITY_MASKS)),
        "a mask has one byte",
    ),
    "a lost image": (
        "voc_segmentation",
        lambda r: first(r, "**/JPEGImages/2007_val*").unlink(),
        "this one is missing",
    ),
    "a path that leads out": (
        "voc_segmentation",
        lambda r: (first(r, VOC_LISTS) / "val.txt").write_text("../../x\n"),
        "this one is missing",
    ),
    "a lost list": (
        "voc_segmentation",
        lambda r: (first(r, VOC_LISTS) / "train.txt").unlink(),
        "list the images",
    ),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(name: str, damage: Any, message: str, tmp_path: Path) -> None:
    root = WRITE[name](tmp_path)
    damage(root)
    with pytest.raises(ValueError, match=rf"`data.root` \(=.*{message}"):
        load(name, root)


@pytest.mark.parametrize("name", WRITE)
def test_missing_files_are_named(name: str, tmp_path: Path) -> None:
    for root in (None, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"`data.root` .* must be the folder of the data set"):
            load(name, root)  # type: ignore[arg-type]


def test_too_few_or_too_many_images(tmp_path: Path) -> None:
    root = write_camvid(tmp_path, {"train": 3, "val": 2, "test": 1})
    with pytest.raises(ValueError, match="must leave images in every split: train has 1"):
        load("camvid", root, limit=2)
    with pytest.raises(ValueError, match="must let the images fit in memory"):
        load("camvid", root, image_size=(16000, 16000))
