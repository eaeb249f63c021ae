"""The formats of Pascal VOC and DOTA: what is read of them, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prunesearch.methods.data import load_data
from prunesearch.methods.data.boxes import unpack_boxes
from prunesearch.methods.data.voc import read_voc

OBJECT = """
  <object><name>{name}</name><pose>Left</pose><difficult>{difficult}</difficult>
    <bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>
  </object>"""


def annotation(name: str, objects: str) -> str:
    return f"""<annotation><folder>VOC2007</folder><filename>{name}.jpg</filename>
  <size><width>40</width><height>30</height><depth>3</depth></size>{objects}
</annotation>"""


def write_voc(root: Path, lists: dict[str, list[str]]) -> Path:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for split, names in lists.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(
            "".join(f"{name}\n" for name in names)
        )
        for name in names:
            Image.new("RGB", (40, 30), (9, 9, 9)).save(root / "JPEGImages" / f"{name}.jpg")
            first = OBJECT.format(name="dog", difficult=0, x1=1, y1=1, x2=20, y2=30)
            second = OBJECT.format(name="cat", difficult=1, x1=11, y1=6, x2=40, y2=25)
            (root / "Annotations" / f"{name}.xml").write_text(annotation(name, first + second))
    return root


def names(prefix: str, count: int = 6) -> list[str]:
    return [f"{prefix}{n}" for n in range(count)]


def test_boxes_count_from_one(tmp_path):
    pool, test = read_voc(write_voc(tmp_path, {"train": names("a"), "val": names("b", 2)}))
    assert test is not None and len(test.labels) == 2
    assert pool.classes == ("cat", "dog")
    target = unpack_boxes(pool.targets(torch.tensor([0]), 40))[0]
    assert target["boxes"].tolist() == [[0, 5, 20, 35], [10, 10, 40, 30]]
    assert target["labels"].tolist() == [2, 1]
    assert target["iscrowd"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("lists", "num_pool", "num_test"),
    [
        ({"trainval": names("a"), "test": names("b", 3)}, 6, 3),
        ({"train": names("a"), "val": names("b", 3), "test": names("c", 2)}, 9, 2),
        ({"train": names("a"), "val": names("b", 3)}, 6, 3),
        ({"trainval": names("a")}, 6, None),
    ],
)
def test_lists(tmp_path, lists, num_pool, num_test):
    pool, test = read_voc(write_voc(tmp_path, lists))
    assert len(pool.labels) == num_pool
    assert (None if test is None else len(test.labels)) == num_test


def test_loaded_as_a_data_set(tmp_path):
    root = write_voc(tmp_path, {"trainval": names("a", 12), "test": names("b", 3)})
    data = load_data("voc", root=root, image_size=32, split=(0.5, 0.25, 0.25))
    assert (len(data.train), len(data.val), len(data.test)) == (8, 4, 3)
    assert data.train.labels.shape == (8, 2, 6)


BOMB = """<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>
<annotation><filename>&b;</filename></annotation>"""
EXTERNAL = """<?xml version="1.0"?><!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/hostname">]>
<annotation><filename>&f;</filename></annotation>"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "document type"),
        (EXTERNAL, "document type"),
        (BOMB.encode("utf-16"), "UnicodeDecodeError"),
        (b" " * (5 * 2**20), "more than 4 MiB"),
        ("", "ParseError"),
        ("<annotation>", "ParseError"),
        ("<a>" * 50_000, "ParseError"),
        ("<annotation/>", "no size/width"),
        (annotation("a0", "").replace("40", "-4"), "size is"),
        (annotation("a0", "").replace("40", "forty"), "ValueError"),
        (annotation("a0", "<object/>"), "no bndbox"),
        (annotation("../../x", ""), "outside of its folder"),
        (annotation("/etc/x", ""), "outside of its folder"),
        (annotation("gone", ""), "not there"),
    ],
)
def test_hostile_and_damaged_annotations(tmp_path, text, reason):
    root = write_voc(tmp_path, {"train": names("a")})
    data = text if isinstance(text, bytes) else text.encode()
    (root / "Annotations" / "a0.xml").write_bytes(data)
    with pytest.raises(ValueError, match=r"^`data\.root`") as caught:
        read_voc(root)
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "gone", "a\\b"])
def test_hostile_lists(tmp_path, name):
    root = write_voc(tmp_path, {"train": names("a")})
    (root / "ImageSets" / "Main" / "train.txt").write_text(f"a0\n{name}\n")
    with pytest.raises(ValueError, match=r"^`data\.root`.*names an image"):
        read_voc(root)


def test_an_image_in_both_lists(tmp_path):
    with pytest.raises(ValueError, match="a0 is in both"):
        read_voc(write_voc(tmp_path, {"train": names("a"), "test": ["a0"]}))


def test_no_folder_no_list_no_object(tmp_path):
    for root in (None, tmp_path):
        with pytest.raises(ValueError, match="VOC's format"):
            read_voc(root)
    with pytest.raises(ValueError, match="must name images"):
        read_voc(write_voc(tmp_path, {}))
    root = write_voc(tmp_path, {"train": names("a")})
    for name in names("a"):
        (root / "Annotations" / f"{name}.xml").write_text(annotation(name, ""))
    with pytest.raises(ValueError, match="no image has an object"):
        read_voc(root)


# --- DOTA ------------------------------------------------------------------------------------


def write_dota(folder: Path, lines: str, size: tuple[int, int] = (60, 40)) -> Path:
    for part in ("images", "labelTxt"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(folder / "images" / "P0001.png")
    head = "imagesource:GoogleEarth\ngsd:0.14\n"
    (folder / "labelTxt" / "P0001.txt").write_text(head + lines)
    return folder


TILTED = "30 10 40 20 30 30 20 20 plane 0\n0 0 10 0 10 10 0 10 small-vehicle 1\n"


def test_oriented_boxes_and_the_upright_ones_around_them(tmp_path):
    from prunesearch.methods.data.dota import read_dota, read_oriented, upright

    write_dota(tmp_path / "train", TILTED)
    write_dota(tmp_path / "val", TILTED)
    (image,) = read_oriented(tmp_path / "train")
    assert image.size == (60, 40) and image.names == ("plane", "small-vehicle")
    assert image.difficult == (False, True)
    assert upright(image.corners).tolist() == [[20, 10, 40, 30], [0, 0, 10, 10]]
    pool, test = read_dota(tmp_path)
    assert test is not None and len(test.labels) == 1
    target = unpack_boxes(pool.targets(torch.tensor([0]), 60))[0]
    assert target["boxes"].tolist() == [[20, 20, 40, 40], [0, 10, 10, 20]]
    assert target["labels"].tolist() == [1, 2] and target["iscrowd"].tolist() == [0, 1]


def test_rotated_iou_by_hand():
    from prunesearch.methods.data.dota import rotated_iou

    square = np.array([[0, 0], [2, 0], [2, 2], [0, 2]], float)
    diamond = np.array([[1, 0], [2, 1], [1, 2], [0, 1]], float)  # half of the square
    shifted = square + [1, 0]
    crossed = square[[0, 2, 1, 3]]
    found = rotated_iou(np.stack([square, diamond]), np.stack([square, shifted, diamond, crossed]))
    assert found == pytest.approx(np.array([[1, 1 / 3, 0.5, 0], [0.5, 1 / 5, 1, 0]]))
    turned = rotated_iou(square[None, ::-1], square[None])  # the other way round
    assert turned == pytest.approx(np.ones((1, 1)))


def test_rotated_iou_against_areas_counted_in_pixels():
    from prunesearch.methods.data.dota import rotated_iou

    rng = np.random.default_rng(0)
    boxes = [_rectangle(rng) for _ in range(6)]
    grid = np.stack(np.meshgrid(np.arange(400), np.arange(400)), -1).reshape(-1, 2) / 4.0
    masks = np.stack([_covers(box, grid) for box in boxes])
    both = (masks[:, None] & masks).sum(2)
    either = (masks[:, None] | masks).sum(2)
    assert rotated_iou(np.stack(boxes), np.stack(boxes)) == pytest.approx(both / either, abs=0.02)


def _rectangle(rng: np.random.Generator) -> np.ndarray:
    angle, (width, height) = rng.uniform(0, np.pi), rng.uniform(20, 40, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [width / 2, height / 2]
    return corners @ turn.T + rng.uniform(40, 60, 2)


def _covers(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    edges = np.roll(corners, -1, 0) - corners
    offsets = points[:, None] - corners
    return (edges[:, 0] * offsets[..., 1] - edges[:, 1] * offsets[..., 0] >= 0).all(1)


def test_large_images_are_cut_into_tiles(tmp_path):
    from prunesearch.methods.data.dota import read_oriented, tiles

    lines = "10 10 30 10 30 30 10 30 ship 0\n96 4 104 4 104 12 96 12 ship 0\n"
    (image,) = read_oriented(write_dota(tmp_path / "train", lines, size=(180, 50)))
    found = list(tiles(image, ["ship"], side=100, overlap=20))
    assert [tile.window for tile in found] == [(0, 0, 100, 50), (80, 0, 180, 50)]
    assert found[0].boxes.tolist() == [[10, 10, 30, 30], [96, 4, 100, 12]]
    assert found[0].ignored.tolist() == [False, True]  # half of the second lies outside
    assert found[1].boxes.tolist() == [[16, 4, 24, 12]]
    assert found[1].ignored.tolist() == [False]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("1 2 3 4 5 6 7 plane 0\n", "line 3"),
        ("1 2 3 4 5 6 7 nan plane 0\n", "finite"),
        ("1 2 3 4 5 6 7 x plane 0\n", "line 3"),
        ("", "no image has an object"),
    ],
)
def test_damaged_dota_files(tmp_path, lines, reason):
    from prunesearch.methods.data.dota import read_dota

    write_dota(tmp_path / "train", lines)
    with pytest.raises(ValueError, match=r"^`data\.root`") as caught:
        read_dota(tmp_path)
    assert reason in str(caught.value)


def test_dota_without_its_image_or_folder(tmp_path):
    from prunesearch.methods.data.dota import read_dota

    with pytest.raises(ValueError, match="DOTA's format"):
        read_dota(tmp_path)
    write_dota(tmp_path / "train", TILTED)
    (tmp_path / "train" / "images" / "P0001.png").unlink()
    with pytest.raises(ValueError, match="not there"):
        read_dota(tmp_path)
