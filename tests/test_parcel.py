"""What a submission sends, and what it refuses to send."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import SMALL, forget_user_code, write_config

from prunesearch.search import ConfigError
from prunesearch.search.cli_common import load
from prunesearch.search.parcel import MAX_CHECKPOINT_MIB, Parcel, pack

MODEL = (
    "from my_package.layers import WIDTH\n"
    "from prunesearch.methods.models.resnet_cifar import resnet20\n"
    "def make(num_classes):\n    return resnet20(num_classes=num_classes)\n"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    forget_user_code()
    yield tmp_path
    forget_user_code()


def packed(folder: Path, *overrides: str, text: str = SMALL) -> Parcel:
    path = write_config(folder, text)
    return pack(path, load(path, overrides), overrides)


def names(parcel: Parcel) -> set[str]:
    return set(parcel.files)


def test_a_known_model_needs_the_config_alone(folder: Path) -> None:
    parcel = packed(folder, "search.trials=3")
    assert names(parcel) == {"config.yaml"}
    assert parcel.overrides == ("search.trials=3",) and parcel.notes == ()


def test_the_users_own_modules_are_sent_and_nothing_else(folder: Path) -> None:
    (folder / "my_own_model.py").write_text(MODEL)
    (folder / "my_package").mkdir()
    (folder / "my_package" / "__init__.py").write_text("")
    (folder / "my_package" / "layers.py").write_text("WIDTH = 16\n")
    (folder / "my_package" / "unused.py").write_text("")
    (folder / "secret.txt").write_text("secret")
    parcel = packed(folder, "model.name=my_own_model:make")
    assert names(parcel) == {
        "config.yaml", "my_own_model.py", "my_package/__init__.py", "my_package/layers.py",
    }  # fmt: skip
    parcel.write(folder / "sent")
    assert (folder / "sent" / "my_package" / "layers.py").read_text() == "WIDTH = 16\n"


def test_an_installed_model_is_named_not_sent(folder: Path) -> None:
    parcel = packed(folder, "model.name=prunesearch.methods.models.resnet_cifar:resnet20")
    assert names(parcel) == {"config.yaml"}
    assert "must be installed on the cluster" in parcel.notes[0]


def test_a_small_checkpoint_is_sent_under_a_plain_name(folder: Path) -> None:
    odd = folder / "my best: weights.safetensors"
    odd.write_bytes(b"weights")
    text = SMALL.replace("{name: resnet20}", f'{{name: resnet20, checkpoint: "{odd.name}"}}')
    parcel = packed(folder, text=text)
    assert parcel.files["checkpoint.safetensors"] == Path(odd.name)
    assert parcel.overrides == ('model.checkpoint="checkpoint.safetensors"',)


def test_a_checkpoint_on_the_cluster_is_said_to_be_there(folder: Path) -> None:
    parcel = packed(folder, "model.checkpoint=/on/the/cluster.pt")
    assert names(parcel) == {"config.yaml"} and parcel.overrides[-1].endswith("cluster.pt")
    assert "read on the cluster" in parcel.notes[0]


def test_a_large_checkpoint_is_not_sent(folder: Path) -> None:
    with (folder / "large.pt").open("wb") as file:
        file.truncate((MAX_CHECKPOINT_MIB + 1) * 2**20)
    with pytest.raises(ConfigError, match=r"model.checkpoint.*at most 100 MiB.*101"):
        packed(folder, "model.checkpoint=large.pt")
    parcel = packed(folder, f"model.checkpoint={folder / 'large.pt'}")
    assert names(parcel) == {"config.yaml"} and "not sent (101 MiB" in parcel.notes[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.root=images", r"data.root.*=images.*absolute"),
        ("model.checkpoint=nowhere.pt", r"model.checkpoint.*=nowhere.pt.*no such file"),
        ("model.kwargs={depth: 20}", r"model.kwargs.*depth"),
        ("model.name=nowhere:make", r"model.name.*=nowhere:make.*no module nowhere"),
        ("model.name=torchvision:resnet19", "resnet18"),
    ],
)
def test_what_would_fail_on_the_cluster_is_refused_here(
    folder: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        packed(folder, override)
