"""COCO's format: what is read of it, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prunesearch.methods.data import load_data
from prunesearch.methods.data.boxes import LABEL, letterbox, unpack_boxes
from prunesearch.methods.data.coco import read_coco

RED, BLUE = (220, 30, 30), (30, 30, 220)
CATEGORIES = [{"id": 7, "name": "cup"}, {"id": 3, "name": "dog"}]  # ids with gaps, unsorted


def content(num_images: int = 6, **changes: object) -> dict[str, object]:
    """Images of 40 x 20 pixels; image n has a red box at (4 + n, 5), 10 x 8, and a blue crowd."""
    images = [
        {"id": 10 + n, "file_name": f"{n:03d}.png", "width": 40, "height": 20}
        for n in range(num_images)
    ]
    annotations = []
    for n in range(num_images):
        annotations += [
            {"id": 2 * n, "image_id": 10 + n, "category_id": 3 if n % 2 else 7,
             "bbox": [4 + n, 5, 10, 8], "area": 80, "iscrowd": 0},
            {"id": 2 * n + 1, "image_id": 10 + n, "category_id": 3, "bbox": [30, 10, 20, 20],
             "area": 100, "iscrowd": 1},
            {"id": 90 + n, "image_id": 10 + n, "category_id": 3, "bbox": [5, 5, 0, 4],
             "area": 0, "iscrowd": 0},
        ]  # fmt: skip
    categories = copy.deepcopy(CATEGORIES)
    return {"images": images, "annotations": annotations, "categories": categories, **changes}


def write(root: Path, split: str = "train", folder: str = "", **changes: object) -> Path:
    coco = content(**changes)  # type: ignore[arg-type]
    place = root / (folder or split)
    place.mkdir(parents=True, exist_ok=True)
    for n in range(6):
        image = Image.new("RGB", (40, 20), (100, 100, 100))
        image.paste(RED, (4 + n, 5, 14 + n, 13))
        image.save(place / f"{n:03d}.png")
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))
    return root


def test_boxes_follow_their_pixels_onto_the_canvas(tmp_path):
    pool, test = read_coco(write(tmp_path))
    assert test is None
    assert pool.classes == ("dog", "cup")  # by category id
    every = torch.arange(6)
    images, rows = pool.read(every, 80), pool.targets(every, 80)
    assert images.shape == (6, 3, 80, 80) and images.dtype == torch.uint8
    for n, (image, target) in enumerate(zip(images, unpack_boxes(rows), strict=True)):
        assert target["labels"].tolist() == [1 if n % 2 else 2, 1]
        assert target["iscrowd"].tolist() == [0, 1]
        left, top, right, bottom = target["boxes"][0].tolist()
        assert (left, top, right, bottom) == (2 * (4 + n), 20 + 10, 2 * (14 + n), 20 + 26)
        red = (image[0].int() - image[2].int()) > 95
        where = red.nonzero()
        assert where.amin(0).tolist() == [top, left]
        assert (where.amax(0) + 1).tolist() == [bottom, right]
        assert target["boxes"][1].tolist() == [60, 40, 80, 60]  # cut at the border


def test_images_without_objects_and_boxes_without_area(tmp_path):
    root = write(tmp_path, annotations=content()["annotations"][:3])
    pool, _ = read_coco(root)
    rows = pool.targets(torch.arange(6), 40)
    assert (rows[:, :, LABEL] > 0).sum(1).tolist() == [2, 0, 0, 0, 0, 0]
    assert [len(t["boxes"]) for t in unpack_boxes(rows)] == [2, 0, 0, 0, 0, 0]
    assert pool.labels.tolist() == [1, 0, 0, 0, 0, 0]  # the rarest class; of equals the first


@pytest.mark.parametrize(
    ("splits", "num_pool", "num_test"),
    [
        ({"train": "train"}, 6, None),
        ({"train2017": "train2017", "val2017": "val2017"}, 6, 6),
        ({"train": "images/train", "val": "images/val", "test": "images/test"}, 12, 6),
        ({"train": "images", "test": "images"}, 6, 6),
    ],
)
def test_layouts_and_splits(tmp_path, splits, num_pool, num_test):
    for split, folder in splits.items():
        write(tmp_path, split, folder)
    pool, test = read_coco(tmp_path)
    assert len(pool.labels) == num_pool
    assert (None if test is None else len(test.labels)) == num_test


def test_loaded_as_a_data_set(tmp_path):
    for split in ("train", "val", "test"):
        write(tmp_path, split)
    data = load_data("coco", root=tmp_path, image_size=64, split=(0.5, 0.25, 0.25), seed=1)
    assert (len(data.train), len(data.val), len(data.test)) == (8, 4, 6)
    assert data.official_test and data.image_shape == (3, 64, 64)
    again = load_data("coco", root=tmp_path, image_size=64, split=(0.5, 0.25, 0.25), seed=1)
    assert torch.equal(data.train.images, again.train.images)
    assert torch.equal(data.val.labels, again.val.labels)
    assert data.train.labels.shape[2] == 6
    with pytest.raises(ValueError, match=r"`data.image_size`.*one number"):
        load_data("coco", root=tmp_path, image_size=(32, 64))


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(40, 20, (0, 16, 64, 32)), (20, 40, (16, 0, 32, 64)), (9, 9, (0, 0, 64, 64)),
     (1000, 1, (0, 31, 64, 1))],
)  # fmt: skip
def test_letterbox(width, height, expected):
    assert letterbox(width, height, 64) == expected


def changed(path: str, value: object) -> dict[str, object]:
    """`content` with one value replaced: images.0.width, for example."""
    coco = content()
    *parents, last = path.split(".")
    place: object = coco
    for key in parents:
        place = place[int(key) if key.isdigit() else key]  # type: ignore[index]
    place[int(last) if last.isdigit() else last] = value  # type: ignore[index]
    return coco


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("images.0.file_name", "../secret.png", "outside of its folder"),
        ("images.0.file_name", "/etc/hostname", "outside of its folder"),
        ("images.0.file_name", "a/../../x.png", "outside of its folder"),
        ("images.0.file_name", "..\\x.png", "names an image"),
        ("images.0.file_name", "gone.png", "not there"),
        ("images.0.file_name", 3, "names an image"),
        ("images.0.file_name", "", "names an image"),
        ("images.0.width", "40", "no number"),
        ("images.0.width", 0, "0 x 20"),
        ("images.0.height", 1e400, "no number"),
        ("images.0.id", 11, "each image once"),
        ("images", [], "images"),
        ("images", {"a": 1}, "TypeError"),
        ("categories", [], "categories"),
        ("categories.1.id", 7, "category"),
        ("annotations.0.image_id", 99, "not there"),
        ("annotations.0.category_id", 99, "KeyError"),
        ("annotations.0.bbox", [1, 2, 3], "ValueError"),
        ("annotations.0.bbox", None, "TypeError"),
        ("annotations.0", 5, "TypeError"),
    ],
)
def test_hostile_and_damaged_annotations(tmp_path, path, value, reason):
    root = write(tmp_path, **changed(path, value))
    with pytest.raises(ValueError, match=r"^`data\.root`") as caught:
        read_coco(root)
    assert reason in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "{}", '"x"'])
def test_files_that_are_no_coco(tmp_path, text):
    root = write(tmp_path)
    (root / "annotations" / "instances_train.json").write_text(text)
    with pytest.raises(ValueError, match=r"^`data\.root`.*instances_train\.json"):
        read_coco(root)


def test_images_that_are_not_what_the_annotations_say(tmp_path):
    root = write(tmp_path)
    Image.new("RGB", (20, 40)).save(root / "train" / "002.png")
    pool, _ = read_coco(root)
    with pytest.raises(ValueError, match=r"002\.png.*annotations say"):
        pool.read(torch.arange(6), 32)
    (root / "train" / "002.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"002\.png.*readable images"):
        pool.read(torch.arange(6), 32)


def test_other_categories_in_another_file(tmp_path):
    write(tmp_path, "train")
    write(tmp_path, "val", categories=[*CATEGORIES, {"id": 9, "name": "cat"}])
    with pytest.raises(ValueError, match="same categories"):
        read_coco(tmp_path)


def test_no_folder_and_no_annotations(tmp_path):
    for root in (None, tmp_path / "none"):
        with pytest.raises(ValueError, match=r"^`data\.root`.*COCO's format"):
            read_coco(root)
    with pytest.raises(ValueError, match="instances_train"):
        read_coco(tmp_path)


def test_grey_and_transparent_images_become_rgb(tmp_path):
    root = write(tmp_path)
    for mode, name in (("L", "000"), ("RGBA", "001"), ("P", "002"), ("1", "003")):
        Image.new(mode, (40, 20), 1).save(root / "train" / f"{name}.png")
    pool, _ = read_coco(root)
    assert pool.read(torch.arange(6), 24).shape == (6, 3, 24, 24)
    assert np.array_equal(pool.read(torch.tensor([4]), 24)[0, :, 0, 0], [114, 114, 114])


def test_a_jpeg_that_is_decoded_smaller_keeps_its_boxes(tmp_path):
    """427 x 641 pixels: half of it, as the decoder rounds, has another shape than the whole."""
    root = write(tmp_path)
    image = Image.new("RGB", (427, 641), (100, 100, 100))
    image.paste(RED, (107, 160, 320, 480))
    image.save(root / "train" / "big.jpg", quality=95)
    coco = content()
    coco["images"] = [{"id": 10, "file_name": "big.jpg", "width": 427, "height": 641}]
    coco["annotations"] = [{"image_id": 10, "category_id": 3, "bbox": [107, 160, 213, 320]}]
    (root / "annotations" / "instances_train.json").write_text(json.dumps(coco))
    pool, _ = read_coco(root)
    first = torch.tensor([0])
    (target,) = unpack_boxes(pool.targets(first, 64))
    pixels = pool.read(first, 64)[0].int()
    where = ((pixels[0] - pixels[2]) > 95).nonzero()
    found = [*where.amin(0).flip(0).tolist(), *(where.amax(0) + 1).flip(0).tolist()]
    assert target["boxes"][0].tolist() == pytest.approx(found, abs=1.01)
