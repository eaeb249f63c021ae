"""Malformed files of data sets: one message that names the file, and no code is run."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.commands import invoke
from faults.payload import PICKLES, run_code
from PIL import Image
from test_data import write_cifar, write_fashion_mnist, write_idx, write_images, write_pickle

from prunesearch.methods.data import fashion_mnist, load_data


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(name: str, root: Path, file: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)`data\.root` \(=.*{file}") as found:
        load_data(name, root=root, image_size=8)
    assert "Traceback" not in str(found.value) and not run_code()


# --- Fashion-MNIST ---------------------------------------------------------------------------


def idx(kind: int, *shape: int, data: bytes = b"", zeros: int = 0) -> bytes:
    return struct.pack(f">HBB{len(shape)}I", zeros, kind, len(shape), *shape) + data


IDX = {
    "empty": b"",
    "three bytes": b"\0\0\x08",
    "no header": b"not an idx file",
    "another magic": idx(8, 4, zeros=1, data=bytes(4)),
    "floats": idx(0x0D, 1, data=bytes(4)),
    "without its data": idx(8, 120, 28, 28),
    "with more data": idx(8, 1, 28, 28, data=bytes(2000)),
    "cut in its shape": idx(8, 120, 28, 28)[:9],
    "255 dimensions": struct.pack(">HBB", 0, 8, 255) + bytes(100),
    "no dimension": idx(8, data=b"\0"),
    "no images": idx(8, 0, 28, 28),
    "no pixels": idx(8, 120, 0, 0),
    "oblong images": idx(8, 1, 28, 14, data=bytes(392)),
    "gigantic": idx(8, 2**32 - 1, 2**32 - 1, 2**32 - 1, data=bytes(10)),
    "a pickle": PICKLES["protocol 0"],
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", IDX)
def test_a_malformed_idx_file_is_named(name: str, zipped: bool, tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, ".gz" if zipped else "")
    file = "train-images-idx3-ubyte" + ".gz" * zipped
    (tmp_path / file).write_bytes(gzip.compress(IDX[name]) if zipped else IDX[name])
    refused("fashion_mnist", tmp_path, file)


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b", b"\x1f\x8b\x08" + bytes(50), b"no gzip"])
def test_a_malformed_gzip_file_is_named(content: bytes, tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(content)
    refused("fashion_mnist", tmp_path, "t10k-labels")


def test_a_cut_gzip_file_is_named(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    refused("fashion_mnist", tmp_path, "train-images")


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "MAX_BYTES", 2**20)
    write_fashion_mnist(tmp_path)
    bomb = idx(8, 2**22, 1, 1, data=bytes(2**22))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bomb))
    refused("fashion_mnist", tmp_path, "train-images")


@pytest.mark.parametrize("labels", [[10] * 30, [255] * 30, [0] * 29, [[0]] * 30])
def test_labels_that_do_not_fit_are_named(labels: list[Any], tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array(labels, dtype=np.uint8))
    refused("fashion_mnist", tmp_path, "t10k-labels")


# --- CIFAR: the only pickles that are read, by a reader that knows arrays and containers only ----

PIXELS = np.zeros((40, 3072), dtype=np.uint8)
LABELS = [label % 10 for label in range(40)]
BATCHES: dict[str, Any] = {
    "a list": [1, 2],
    "no data": {"labels": LABELS},
    "no labels": {"data": PIXELS},
    "labels in a number": {"data": PIXELS, "labels": 3},
    "labels in words": {"data": PIXELS, "labels": ["cat"] * 40},
    "labels in lists": {"data": PIXELS, "labels": [[0]] * 40},
    "labels that are no numbers": {"data": PIXELS, "labels": [float("nan")] * 40},
    "labels of another data set": {"data": PIXELS, "labels": [99] * 40},
    "negative labels": {"data": PIXELS, "labels": [-1] * 40},
    "fewer labels": {"data": PIXELS, "labels": LABELS[:39]},
    "no images": {"data": PIXELS[:0], "labels": []},
    "pixels in a list": {"data": PIXELS.tolist(), "labels": LABELS},
    "another shape": {"data": PIXELS.reshape(40, 3, 32, 32), "labels": LABELS},
    "floats": {"data": PIXELS.astype(np.float32), "labels": LABELS},
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_malformed_cifar_batch_is_named(name: str, tmp_path: Path) -> None:
    write_cifar(tmp_path, 10)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(pickled(BATCHES[name], path))
    refused("cifar10", tmp_path, "data_batch_3")


def pickled(value: Any, path: Path) -> bytes:
    write_pickle(path, value)
    return path.read_bytes()


@pytest.mark.parametrize("names", [3, "cat", [], {"cat": 1}])
def test_malformed_names_of_classes_are_named(names: Any, tmp_path: Path) -> None:
    write_cifar(tmp_path, 10)
    write_pickle(tmp_path / "cifar-10-batches-py" / "batches.meta", {"label_names": names})
    refused("cifar10", tmp_path, "batches.meta")


@pytest.mark.parametrize("file", ["batches.meta", "data_batch_1", "test_batch"])
def test_a_payload_in_a_cifar_file_does_not_run(file: str, tmp_path: Path) -> None:
    write_cifar(tmp_path, 10)
    path = tmp_path / "cifar-10-batches-py" / file
    others = (b"", b".", b"\x80\x05", b"\x80\xff.", b"\x82\x01.", b"Pcanary\n.", b"(" * 10_000)
    objects = b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR."
    gigantic = (
        b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(L9999999999999L\ntS'b'\ntR."
    )
    for content in (*PICKLES.values(), *others, objects, gigantic):
        path.write_bytes(content)
        refused("cifar10", tmp_path, file)


# --- folders of images -----------------------------------------------------------------------


def damage(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def png(*, width: int, height: int) -> bytes:
    """The header of a picture that is not there."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )


def thin(path: Path) -> None:
    Image.new("RGB", (4000, 1)).save(path)


IMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": damage(lambda data: b""),
    "text": damage(lambda data: b"not a picture"),
    "half": damage(lambda data: data[: len(data) // 2]),
    "only a header": damage(lambda data: data[:33]),
    "another checksum": damage(lambda data: data[:30] + b"\0" + data[31:]),
    "changed pixels": damage(lambda data: data[:60] + bytes(20) + data[80:]),
    "a bomb": damage(lambda data: png(width=2**30, height=2**30)),
    "of no width": damage(lambda data: png(width=0, height=10)),
    "without pixels": damage(lambda data: png(width=10, height=10)),
    "a jpeg's start": damage(lambda data: b"\xff\xd8\xff\xe0" + bytes(20)),
    "a gif's start": damage(lambda data: b"GIF89a" + bytes(10)),
    "a tiff's start": damage(lambda data: b"II*\0\x08\0\0\0" + b"\xff" * 20),
    "a ppm of no pixels": damage(lambda data: b"P6 0 0 255\n"),
    "a thin one": thin,
    "a pickle": damage(lambda data: PICKLES["protocol 2"]),
}


@pytest.mark.parametrize("name", IMAGES)
def test_a_malformed_image_is_named(name: str, tmp_path: Path) -> None:
    write_images(tmp_path, {"cat": 8, "dog": 8})
    IMAGES[name](tmp_path / "cat" / "0.png")
    refused("image_folder", tmp_path, "cat/0.png")


def test_an_image_that_is_no_file_is_named(tmp_path: Path) -> None:
    write_images(tmp_path, {"cat": 8, "dog": 8})
    path = tmp_path / "cat" / "0.png"
    for make in (Path.mkdir, lambda path: path.symlink_to(path.name)):
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        refused("image_folder", tmp_path, "cat/0.png")


def test_the_command_line_says_it_too(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"cat": 8, "dog": 8})
    (tmp_path / "images" / "cat" / "0.png").write_bytes(b"")
    (tmp_path / "config.yaml").write_text(
        "model: {name: resnet20}\ndata: {name: image_folder, root: images, image_size: 8}\n"
    )
    for command in (["check", "config.yaml"], ["run", "config.yaml", "--dry-run"]):
        ended = invoke(*command)
        assert ended.code == 2 and "cat/0.png" in ended.err, ended
