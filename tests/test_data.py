"""Every data set, read from files in the real format, and its split."""

from __future__ import annotations

import gzip
import io
import math
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from prunesearch.methods.data import DATASETS, load_data
from prunesearch.methods.data import cifar as cifar_module
from prunesearch.methods.data.digits import read_digits
from prunesearch.methods.data.fashion_mnist import DEBIAN, read_idx
from prunesearch.methods.data.image_data import channel_statistics, convert_channels, resize
from prunesearch.methods.data.split import stratified_split, stratified_subset

RNG = np.random.default_rng(0)
CLASSIFICATION = [name for name, entry in DATASETS.items() if entry.task == "classification"]


@pytest.fixture(autouse=True)
def private_places(monkeypatch, tmp_path):
    """No test reads or writes the user's cache, and none downloads."""
    torch.set_num_threads(1)
    monkeypatch.delenv("PRUNE_SEARCH_DATA", raising=False)
    monkeypatch.setattr("prunesearch.methods.data.files.CACHE", tmp_path / "cache")

    def no_network(*args, **kwargs):
        raise OSError("no network")

    for name in ("CIFAR10", "CIFAR100", "FashionMNIST"):
        monkeypatch.setattr(f"torchvision.datasets.{name}.download", no_network)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    data = header + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_fashion_mnist(root: Path, suffix: str = ".gz") -> None:
    for prefix, per_class in (("train", 12), ("t10k", 3)):
        labels = RNG.permutation(np.repeat(np.arange(10), per_class)).astype(np.uint8)
        images = RNG.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
        write_idx(root / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(root / f"{prefix}-labels-idx1-ubyte{suffix}", labels)


class OldPickler(pickle.Pickler):
    """Writes dtypes as the files of 2009 hold them, with an integer for `align`."""

    def reducer_override(self, value):
        if isinstance(value, np.dtype):
            return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)
        return NotImplemented


def write_pickle(path: Path, value: object) -> None:
    buffer = io.BytesIO()
    OldPickler(buffer, protocol=2).dump(value)
    path.write_bytes(buffer.getvalue().replace(b"numpy._core.", b"numpy.core."))


def write_cifar(root: Path, num_classes: int) -> None:
    layout = cifar_module.CIFAR10 if num_classes == 10 else cifar_module.CIFAR100
    folder = root / layout.folder
    folder.mkdir(parents=True)
    per_class = 4 if num_classes == 10 else 12
    for file in (*layout.train, layout.test):
        labels = np.repeat(np.arange(num_classes), per_class).tolist()
        pixels = RNG.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        write_pickle(folder / file, {"data": pixels, layout.labels_key: labels})
    names = [f"class {label}" for label in range(num_classes)]
    write_pickle(folder / layout.meta, {layout.names_key: names})


def write_images(folder: Path, classes: dict[str, int], size: tuple[int, int] = (40, 30)) -> None:
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def write_files(name: str, root: Path) -> Path | None:
    """Small files in the data set's own format, with the root to read them from."""
    if name == "digits":
        return None
    if name == "fashion_mnist":
        write_fashion_mnist(root)
    elif name == "image_folder":
        write_images(root, {"cat": 10, "dog": 13, ".hidden": 1})
    else:
        write_cifar(root, DATASETS[name].num_classes)
    return root


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_contract(name, tmp_path):
    root = write_files(name, tmp_path)
    data = load_data(name, root=root, image_size=16, seed=1)
    again = load_data(name.replace("_", "-"), root=root, image_size=16, seed=1)
    other = load_data(name, root=root, image_size=16, seed=2)
    assert data.name == name
    assert data.image_shape == (3, 16, 16)
    splits = {"train": data.train, "val": data.val, "test": data.test}
    for part, split in splits.items():
        assert split.images.dtype == torch.uint8
        assert split.images.shape == (len(split), 3, 16, 16)
        assert split.labels.dtype == torch.int64
        assert 0 <= split.labels.min() and split.labels.max() < len(data.classes)
        assert torch.equal(split.images, getattr(again, part).images)
        assert torch.equal(split.labels, getattr(again, part).labels)
    assert DATASETS[name].num_classes in (None, len(data.classes))
    assert not torch.equal(data.train.images, other.train.images)

    images = torch.cat([data.train.images, data.val.images, data.test.images]).flatten(1)
    assert len(torch.unique(images, dim=0)) == len(images), "the splits share an image"

    pool = [data.train, data.val] + ([] if data.official_test else [data.test])
    shares = [0.7 / 0.85, 0.15 / 0.85] if data.official_test else [0.7, 0.15, 0.15]
    totals = sum(torch.bincount(part.labels, minlength=len(data.classes)) for part in pool)
    for part, share in zip(pool, shares, strict=True):
        counts = torch.bincount(part.labels, minlength=len(data.classes))
        assert (counts - totals * share).abs().max() <= 1

    mean = data.train.images.double().div(255).mean((0, 2, 3))
    std = data.train.images.double().div(255).std((0, 2, 3), correction=0)
    assert data.mean == pytest.approx(mean.tolist(), abs=1e-6)
    assert data.std == pytest.approx(std.tolist(), abs=1e-6)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_grey_images_and_limits(name, tmp_path):
    root = write_files(name, tmp_path)
    full = load_data(name, root=root, image_size=8, channels=1)
    small = load_data(name, root=root, image_size=8, channels=1, limit=2 * len(full.classes) + 5)
    if len(full.classes) > 10:
        small = load_data(name, root=root, image_size=8, channels=1, limit=600)
    assert full.image_shape == (1, 8, 8)
    assert len(full.mean) == 1
    assert len(small.train) + len(small.val) < len(full.train) + len(full.val)
    assert torch.equal(small.test.images, full.test.images)
    assert len(small.train.labels.unique()) == len(full.classes)


def test_digits_keep_their_pixels():
    data = load_data("digits", channels=1)
    assert data.image_shape == (1, 8, 8)
    assert len(data.train) + len(data.val) + len(data.test) == 1797
    assert data.train.images.max() == 255
    assert not data.official_test and not data.horizontal_flip


def test_digits_are_scikit_learn_s():
    known = load_digits()
    source, test = read_digits(None)
    images = source.read(torch.arange(1797), None)
    assert test is None and torch.equal(source.labels, torch.from_numpy(known.target))
    pixels = images.double().mul(16 / 255).round().squeeze(1)
    assert torch.equal(pixels, torch.from_numpy(known.images))


@pytest.mark.skipif(not DEBIAN.is_dir(), reason=f"Debian's dataset-fashion-mnist: no {DEBIAN}")
def test_real_fashion_mnist():
    data = load_data("fashion-mnist", channels=1)
    assert (len(data.train), len(data.val), len(data.test)) == (49410, 10590, 10000)
    assert data.image_shape == (1, 28, 28)
    assert data.official_test
    assert data.classes[data.test.labels[0]] == "ankle boot"
    assert data.mean == pytest.approx([0.286], abs=0.002)
    assert data.std == pytest.approx([0.353], abs=0.002)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_round_trip(tmp_path, suffix):
    array = RNG.integers(0, 256, (3, 4, 5), dtype=np.uint8)
    path = tmp_path / f"array{suffix}"
    write_idx(path, array)
    assert torch.equal(read_idx(path), torch.from_numpy(array))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="must hold readable idx files"):
        read_idx(path)


def test_cifar_pixels_are_red_green_blue_planes(tmp_path):
    write_cifar(tmp_path, 10)
    batch = cifar_module._unpickle(tmp_path / "cifar-10-batches-py" / "data_batch_2")
    train, _ = cifar_module.read_cifar10(tmp_path / "cifar-10-batches-py")
    image = train.read(torch.tensor([45]), None)[0]
    assert image.flatten().tolist() == batch["data"][5].tolist()
    assert train.labels[45] == batch["labels"][5]
    assert train.classes[3] == "class 3"


def test_cifar_files_cannot_run_code(tmp_path):
    write_cifar(tmp_path, 10)
    path = tmp_path / "cifar-10-batches-py" / "batches.meta"
    path.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(ValueError, match="os.system is not part of a CIFAR file"):
        load_data("cifar10", root=tmp_path)


def test_files_are_found_by_the_environment(tmp_path, monkeypatch):
    write_cifar(tmp_path / "data", 10)
    monkeypatch.setenv("PRUNE_SEARCH_DATA", str(tmp_path / "data"))
    assert len(load_data("cifar10").test) == 40


def test_image_folder_with_a_test_folder(tmp_path):
    write_images(tmp_path / "train", {"a": 8, "b": 9}, size=(20, 50))
    write_images(tmp_path / "val", {"a": 2, "b": 3})
    data = load_data("image_folder", root=tmp_path, image_size=10)
    assert data.official_test
    assert data.classes == ("a", "b")
    assert data.test.labels.tolist() == [0, 0, 1, 1, 1]
    write_images(tmp_path / "test", {"a": 1, "b": 1})
    with pytest.warns(UserWarning, match="val is not read"):
        assert len(load_data("image_folder", root=tmp_path, image_size=10).test) == 2


def test_image_folder_crops_the_centre(tmp_path):
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
        for index in range(9):
            wide = np.zeros((20, 60, 3), dtype=np.uint8)
            wide[:, 20:40] = 200
            Image.fromarray(wide).save(tmp_path / name / f"{index}.png")
    data = load_data("image_folder", root=tmp_path, image_size=20)
    assert (data.train.images == 200).all()


def test_wrong_image_folders(tmp_path):
    write_images(tmp_path / "few", {"only": 3})
    write_images(tmp_path / "empty", {"a": 3, "b": 0})
    write_images(tmp_path / "broken", {"a": 6, "b": 6})
    for path in (tmp_path / "broken").rglob("*.png"):
        path.write_bytes(b"not a picture")
    write_images(tmp_path / "differ" / "train", {"a": 3, "b": 3})
    write_images(tmp_path / "differ" / "test", {"a": 3, "c": 3})
    for folder, message in {
        "none": "must be a folder",
        "few": "at least two class folders: it has 1",
        "empty": "b/ has none",
        "broken": "must hold readable images: cannot identify",
        "differ": r"only in train \['b'\], only in the other \['c'\]",
    }.items():
        with pytest.raises(ValueError, match=rf"`data.root` \(=.*{message}"):
            load_data("image_folder", root=tmp_path / folder, image_size=8)


def test_what_does_not_fit_in_memory_is_refused_before_it_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"1797 images .* GiB, more than 4 GiB"):
        load_data("digits", image_size=15_500)


def test_statistics_of_large_images_are_read_from_few_of_them(tmp_path):
    """What does not fit in memory is streamed; nor does a sample of any number of images."""
    write_images(tmp_path, {"a": 6, "b": 6}, size=(4, 4))
    data = load_data("image_folder", root=tmp_path, image_size=2000, memory_bytes=100 * 2**20)
    assert len(data.train) == 8 and all(0 < value < 1 for value in (*data.mean, *data.std))


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100"])
def test_missing_files(name, tmp_path):
    with pytest.raises(ValueError, match=r"`data.root` \(=.*nowhere\) must be a folder"):
        load_data(name, root=tmp_path / "nowhere")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(ValueError, match=r"hollow, and the download failed \(no network\)"):
        load_data(name, root=tmp_path / "hollow")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "digit"}, r"`data.name` \(=digit\).*Did you mean `digits`"),
        ({"split": (0.7, 0.2, 0.2)}, r"`data.split` .* must sum to 1: it sums to 1.1"),
        ({"split": (0.8, 0.2, 0.0)}, r"must be three numbers above 0"),
        ({"split": (0.8, 0.2)}, r"must be three numbers above 0"),
        ({"split": (0.001, 0.5, 0.499)}, r"train is short"),
        ({"limit": 12}, r"`data.limit` \(=12\) must be at least 20"),
        ({"image_size": 0}, r"`data.image_size` \(=0\) must be at least 1"),
        ({"image_size": 4000}, r"take 80.3 GiB"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_data(**{"name": "digits", **arguments})


def test_wrong_channels():
    with pytest.raises(ValueError, match=r"`channels` \(=4\).*in_channels: 3"):
        convert_channels(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), 4)


def test_stratified_choices():
    labels = torch.tensor([0] * 50 + [1] * 31 + [2] * 3)
    for fraction in (0.0, 0.15, 0.5):
        generator = torch.Generator().manual_seed(0)
        rest, taken = stratified_split(labels, fraction, generator)
        assert sorted([*rest.tolist(), *taken.tolist()]) == list(range(84))
        for label, total in enumerate((50, 31, 3)):
            assert (labels[taken] == label).sum() == math.floor(total * fraction + 0.5)
    subset = stratified_subset(labels, 20, torch.Generator().manual_seed(0))
    assert torch.bincount(labels[subset]).tolist() == [12, 7, 1]
    assert stratified_subset(labels, 99, torch.Generator()).tolist() == list(range(84))


@pytest.mark.parametrize("size", [7, 12, 24, 51])
def test_resize_agrees_with_pillow(size):
    pixels = RNG.integers(0, 256, (24, 24), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR)
    ours = resize(torch.from_numpy(pixels).view(1, 1, 24, 24), size)[0, 0]
    assert (ours.int() - torch.from_numpy(np.array(image)).int()).abs().max() <= 1


def test_a_constant_channel_has_a_usable_std():
    mean, std = channel_statistics(torch.full((4, 1, 3, 3), 51, dtype=torch.uint8))
    assert mean == pytest.approx((0.2,))
    assert std == pytest.approx((1 / 255,))
