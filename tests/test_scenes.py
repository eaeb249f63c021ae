"""The made scenes: what they show, and their files in COCO's and Cityscapes' formats."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from prunesearch.methods.data import scenes_files
from prunesearch.methods.data.fashion_mnist import CLASSES, DEBIAN
from prunesearch.methods.data.scenes import (
    MIN_PIXELS,
    SPLITS,
    SceneOptions,
    make_scenes,
    read_clothing,
    tight_box,
)
from prunesearch.methods.data.scenes_files import (
    CANVAS_ID,
    CLASS_IDS,
    VOID_ID,
    label_ids,
    run_lengths,
    scenes_folder,
)

pytestmark = pytest.mark.skipif(not DEBIAN.is_dir(), reason=f"dataset-fashion-mnist: no {DEBIAN}")

OPTIONS = SceneOptions(num_train=12, num_val=4, num_test=4, size=64, max_objects=4, seed=3)


@pytest.fixture(scope="module")
def clothing():
    return read_clothing()


@pytest.fixture(scope="module")
def scenes(clothing):
    return {split: list(make_scenes(OPTIONS, split, clothing)) for split in SPLITS}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("scenes")


def test_scenes_depend_on_seed_split_and_number_only(scenes, clothing):
    larger = replace(OPTIONS, num_train=40)
    longer = islice(make_scenes(larger, "train", clothing), 3)
    for scene, again in zip(scenes["train"][:3], longer, strict=True):
        assert np.array_equal(scene.image, again.image)
        assert np.array_equal(scene.instances, again.instances)
        assert scene.labels == again.labels
    other = next(make_scenes(replace(OPTIONS, seed=4), "train", clothing))
    assert not np.array_equal(other.image, scenes["train"][0].image)
    assert not np.array_equal(scenes["val"][0].image, scenes["train"][0].image)


def test_every_object_is_seen_and_some_overlap(scenes, clothing):
    several = 0
    many = replace(OPTIONS, num_train=30, max_objects=8)
    for scene in [*scenes["train"], *make_scenes(many, "train", clothing)]:
        assert scene.image.shape == (64, 64, 3)
        assert 1 <= len(scene.labels) <= 8
        assert set(np.unique(scene.instances)) - {0} == set(range(1, len(scene.labels) + 1))
        assert np.bincount(scene.instances.ravel())[1:].min() >= MIN_PIXELS
        assert not (scene.edges & (scene.instances > 0)).any()
        boxes = [tight_box(scene.instances == n + 1) for n in range(len(scene.labels))]
        several += any(
            a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]
            for i, a in enumerate(boxes)
            for b in boxes[:i]
        )
    assert several >= 5  # boxes meet
    assert {label for scene in scenes["train"] for label in scene.labels} <= set(range(10))


def test_val_objects_are_in_no_training_scene(clothing):
    from prunesearch.methods.data.scenes import _sprites

    images = {split: _sprites(clothing, split)[0] for split in SPLITS}
    assert len(images["train"]) + len(images["val"]) == 60_000
    assert len(images["val"]) == 10_000 and len(images["test"]) == 10_000


def test_tight_box():
    mask = np.zeros((6, 9), bool)
    mask[2:5, 3:8] = True
    assert tight_box(mask) == (3, 2, 5, 3)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(["000", "000"], [6]), (["100", "110"], [0, 2, 1, 1, 2]), (["11", "11"], [0, 4])],
)
def test_run_lengths(rows, expected):
    mask = np.array([[character == "1" for character in row] for row in rows])
    assert run_lengths(mask) == expected


def test_coco_files_as_the_reference_reads_them(scenes, root):
    reference = pytest.importorskip("faster_coco_eval")
    folder = scenes_folder("coco", root, OPTIONS)
    for split in SPLITS:
        coco = reference.COCO(str(folder / "annotations" / f"instances_{split}.json"))
        assert [coco.cats[n]["name"] for n in sorted(coco.cats)] == list(CLASSES)
        assert len(coco.imgs) == len(scenes[split])
        for image_id, scene in zip(sorted(coco.imgs), scenes[split], strict=True):
            file = folder / "images" / split / coco.imgs[image_id]["file_name"]
            assert np.array_equal(np.array(Image.open(file)), scene.image)
            annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
            assert [a["category_id"] - 1 for a in annotations] == list(scene.labels)
            for number, annotation in enumerate(annotations, 1):
                mask = coco.annToMask(annotation).astype(bool)
                assert np.array_equal(mask, scene.instances == number)
                assert annotation["area"] == mask.sum()
                assert tuple(annotation["bbox"]) == tight_box(mask)


def test_cityscapes_files(scenes, root):
    folder = scenes_folder("cityscapes", root, OPTIONS)
    for split in SPLITS:
        images = sorted((folder / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        masks = sorted((folder / "gtFine" / split).glob("*/*_gtFine_labelIds.png"))
        assert [p.name.split("_left")[0] for p in images] == [
            p.name.split("_gt")[0] for p in masks
        ]
        for image, mask, scene in zip(images, masks, scenes[split], strict=True):
            assert np.array_equal(np.array(Image.open(image)), scene.image)
            ids = np.array(Image.open(mask))
            assert np.array_equal(ids, label_ids(scene))
            for number, label in enumerate(scene.labels, 1):
                assert set(ids[scene.instances == number]) == {CLASS_IDS[label]}
            assert set(ids[scene.instances == 0]) <= {CANVAS_ID, VOID_ID}
            assert (ids == VOID_ID).sum() == scene.edges.sum() > 0


def test_a_folder_is_made_once_and_named_after_its_options(root, monkeypatch):
    folder = scenes_folder("coco", root, OPTIONS)
    monkeypatch.setattr(scenes_files, "make_scenes", None)  # nothing is made again
    assert scenes_folder("coco", root, OPTIONS) == folder
    monkeypatch.undo()
    other = scenes_folder("coco", root, replace(OPTIONS, num_train=1, num_val=1, num_test=1))
    assert other != folder and scenes_folder("cityscapes", root, OPTIONS) != folder
    info = json.loads((other / "annotations" / "instances_val.json").read_text())["info"]
    assert info["options"]["num_train"] == 1


def test_several_at_once_make_one_folder(tmp_path):
    options = SceneOptions(num_train=2, num_val=1, num_test=1, size=48)
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: scenes_folder("coco", tmp_path, options), range(3)))
    assert len(folders) == 1
    assert [path.name for path in (tmp_path / "scenes").iterdir()] == [folders.pop().name]


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(options, split, clothing):
        yield from islice(make_scenes(options, split, clothing), 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes_files, "make_scenes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scenes_folder("coco", tmp_path, OPTIONS)
    assert not list((tmp_path / "scenes").iterdir())


def test_a_root_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`data.root` \(=.*file\) must be a folder"):
        scenes_folder("coco", tmp_path / "file", OPTIONS)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("num_train", 0), ("size", 8), ("max_objects", 101), ("num_test", -1)]
)
def test_wrong_options(field, value):
    with pytest.raises(ValueError, match=f"`{field}`"):
        SceneOptions(**{field: value})
