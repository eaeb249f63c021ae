"""Malformed exports, safetensors files and checkpoints: refused by name, and no code is run."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.commands import invoke
from faults.payload import CANARY, PICKLES, Payload, run_code
from safetensors.torch import save, save_file
from torch import Tensor, nn

from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.models.build import build_model, load_checkpoint
from prunesearch.methods.shapes import changed_attributes, copy_state
from prunesearch.methods.surgery import PruningPlan, Recipe, prune
from prunesearch.methods.tasks.classification import ClassificationTask
from prunesearch.search.cache import Made
from prunesearch.search.config import ConfigError, parse_config
from prunesearch.search.context import TrialContext
from prunesearch.search.export import FORMAT, RECIPE, WEIGHTS, load_pruned
from prunesearch.search.setup import load_images, make_task
from prunesearch.search.shelf import ENTRY, TENSORS, Packed, Shelf, address
from prunesearch.search.work import take_up

TOUCH = f"touch {CANARY}"
KEY = {"kind": "scores", "criterion": "fgp"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return build_model("resnet20", num_classes=10)


@pytest.fixture(scope="module")
def plan(dense: nn.Module) -> PruningPlan:
    return plan_pruning(dense, torch.randn(2, 3, 8, 8))


@pytest.fixture(scope="module")
def pruned(dense: nn.Module, plan: PruningPlan) -> nn.Module:
    kept = {g.name: tuple(range(0, g.num_channels, 2)) for g in plan.alive(["layer1.1"])}
    return prune(dense, plan, Recipe(("layer1.1",), kept))


@pytest.fixture
def exported(tmp_path: Path, dense: nn.Module, pruned: nn.Module) -> Path:
    folder = tmp_path / "exported"
    folder.mkdir()
    document = {
        "format": FORMAT,
        "model": {"name": "resnet20", "kwargs": {}, "num_classes": 10},
        "dropped_blocks": ["layer1.1"],
        "attributes": changed_attributes(dense, pruned),
    }
    (folder / RECIPE).write_text(json.dumps(document))
    save_file(copy_state(pruned), folder / WEIGHTS)
    return folder


def test_what_is_not_damaged_loads(exported: Path, pruned: nn.Module) -> None:
    images = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(load_pruned(exported)(images), pruned.eval()(images))


# --- recipes ---------------------------------------------------------------------------------


def model(**changes: Any) -> dict[str, Any]:
    return {"model": {"name": "resnet20", "kwargs": {}, "num_classes": 10} | changes}


def attributes(**changes: Any) -> dict[str, Any]:
    return {"attributes": {"conv1": changes}}


RECIPES: dict[str, dict[str, Any]] = {
    "another format": {"format": "prune-search/99"},
    "a model in a text": {"model": "resnet20"},
    "a model without a name": {"model": {"kwargs": {}, "num_classes": 10}},
    "a name in a list": model(name=["resnet20"]),
    "an unknown name": model(name="resnet21"),
    "an empty name": model(name=""),
    "classes in words": model(num_classes="many"),
    "no classes": model(num_classes=0),
    "fewer classes than none": model(num_classes=-1),
    "classes for no memory": model(num_classes=10**18),
    "arguments in a list": model(kwargs=[1]),
    "unknown arguments": model(kwargs={"command": TOUCH}),
    "an argument for no memory": model(kwargs={"in_channels": 10**15}),
    "a shell": model(name="os:system", kwargs={"command": TOUCH}),
    "the shell behind it": model(name="posix:system", kwargs={"command": TOUCH}),
    "a process": model(name="subprocess:call", kwargs={"args": TOUCH, "shell": True}),
    "a built-in": model(name="builtins:exec", kwargs={"source": TOUCH}),
    "an unpickler": model(name="torch:load", kwargs={"f": "evil.pt", "weights_only": False}),
    "an unpickler of pandas": model(name="pandas:read_pickle", kwargs={"f": "evil.pt"}),
    "a module beside it": model(name="evil:make"),
    "torchvision's path": model(name="torchvision:../../evil"),
    "timm's file": model(name="timm:resnet18", kwargs={"checkpoint_path": "evil.pt"}),
    "timm's folder": model(name="timm:local-dir:."),
    "timm's hub": model(name="timm:hf-hub:me/evil"),
    "blocks in a text": {"dropped_blocks": "layer1.1"},
    "an unknown block": {"dropped_blocks": ["layer9.9"]},
    "the whole model": {"dropped_blocks": [""]},
    "a method for a block": {"dropped_blocks": ["layer1.1.forward"]},
    "a class for a block": {"dropped_blocks": ["__class__"]},
    "a block in a list": {"dropped_blocks": [["layer1.1"]]},
    "attributes in a list": {"attributes": ["conv1"]},
    "attributes in a text": {"attributes": {"conv1": "out_channels"}},
    "an unknown module": {"attributes": {"conv9": {"out_channels": 4}}},
    "a negative width": attributes(out_channels=-4),
    "no width": attributes(out_channels=0),
    "a gigantic width": attributes(out_channels=10**12),
    "a width of 4000 bits": attributes(out_channels=2**4000),
    "a wider one": attributes(out_channels=17),
    "half a channel": attributes(out_channels=6.5),
    "a width that is true": attributes(out_channels=True),
    "a width in words": attributes(out_channels="8"),
    "an empty width": attributes(out_channels=None),
    "a class": attributes(__class__="torch.nn.Linear"),
    "a dictionary": attributes(__dict__={}),
    "a method": attributes(forward=1),
    "a weight": attributes(weight=1),
    "a table of parameters": attributes(_parameters={}),
    "a hook": attributes(_forward_hooks={"1": TOUCH}),
    "an attribute that is new": attributes(evil=1),
    "a flag": attributes(training=1),
    "a stride of three": attributes(stride=[1, 1, 1]),
    "a kernel of nothing": attributes(kernel_size=[0, 0]),
    "a mode of padding": attributes(padding_mode="evil"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_malformed_recipe_is_refused(name: str, exported: Path) -> None:
    Path("evil.pt").write_bytes(PICKLES["protocol 2"])
    Path("evil.py").write_text(f"import os\nos.system('{TOUCH}')\n")
    recipe = json.loads((exported / RECIPE).read_text()) | RECIPES[name]
    (exported / RECIPE).write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=r"^(?!.*Traceback)."):
        load_pruned(exported)
    assert not run_code()


TEXTS = {
    "empty": b"",
    "cut": b'{"format":',
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "deep": b"[" * 100_000,
    "not UTF-8": b'{"format": "\xff"}',
    "a long number": b'{"format": ' + b"9" * 5000 + b"}",
    "a pickle": PICKLES["protocol 0"],
    "no format": b"{}",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_recipe_that_is_none_is_refused(name: str, exported: Path) -> None:
    (exported / RECIPE).write_bytes(TEXTS[name])
    with pytest.raises(ValueError, match="must be an exported recipe"):
        load_pruned(exported)
    assert not run_code()


def test_code_runs_only_where_the_caller_says_so(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("my_net.py").write_text(
        "from pathlib import Path\n"
        "from prunesearch.methods.models.resnet_cifar import resnet20\n"
        f"def make(num_classes):\n    Path('{CANARY}').touch()\n    return resnet20(num_classes)\n"
    )
    monkeypatch.syspath_prepend(Path.cwd())
    recipe = json.loads((exported / RECIPE).read_text()) | model(name="my_net:make")
    (exported / RECIPE).write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=r"`run_code` \(=False\).*my_net:make.*run_code=True"):
        load_pruned(exported)
    assert not run_code()
    load_pruned(exported, model=build_model("resnet20", num_classes=10))
    assert not run_code()
    load_pruned(exported, run_code=True)
    assert run_code()


# --- safetensors -----------------------------------------------------------------------------


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


FILES: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "a header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "a header of 200 MB": struct.pack("<Q", 200_000_000) + b" " * 1000,
    "no header": struct.pack("<Q", 0),
    "a header that is no JSON": file_of(b"not JSON"),
    "a header in a list": file_of([]),
    "a header that is no text": file_of(b'{"\xff": 1}'),
    "a deep header": file_of(b"[" * 100_000),
    "a tensor in a text": file_of({"fc.bias": "F32"}),
    "overlapping offsets": file_of(
        {"a": tensor("F32", [2], 0, 8), "b": tensor("F32", [2], 4, 12)}, bytes(12)
    ),
    "a hole": file_of({"a": tensor("F32", [1], 4, 8)}, bytes(8)),
    "offsets beyond the end": file_of({"a": tensor("F32", [4], 0, 16)}, bytes(4)),
    "offsets backwards": file_of({"a": tensor("F32", [1], 4, 0)}, bytes(4)),
    "negative offsets": file_of({"a": tensor("F32", [1], -4, 0)}, bytes(4)),
    "offsets beyond all bounds": file_of({"a": tensor("F32", [1], 2**64 - 4, 2**64)}, bytes(4)),
    "a shape beyond all bounds": file_of({"a": tensor("F32", [2**40, 2**40], 0, 4)}, bytes(4)),
    "a negative shape": file_of({"a": tensor("F32", [-1], 0, 4)}, bytes(4)),
    "an unknown kind": file_of({"a": tensor("EVIL", [1], 0, 4)}, bytes(4)),
    "bytes at the end": file_of({"a": tensor("F32", [1], 0, 4)}, bytes(8)),
    "a pickle": PICKLES["protocol 2"],
    "a zip": b"PK\3\4" + bytes(40),
}


def changed(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def state(good: dict[str, Tensor]) -> dict[str, Tensor]:
        new = change(good[name])
        return {k: v for k, v in good.items() if k != name} | ({} if new is None else {name: new})

    return state


STATES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "one is missing": changed("fc.weight", lambda value: None),
    "one is too many": lambda good: good | {"evil": torch.zeros(1)},
    "none is there": lambda good: {"evil": torch.zeros(1)},
    "other channels": changed("conv1.weight", lambda value: value[:4].clone()),
    "other inputs": changed("fc.weight", lambda value: value[:, :4].clone()),
    "a flat one": changed("conv1.weight", lambda value: value.flatten()),
    "an empty one": changed("bn1.weight", lambda value: value[:0].clone()),
    "whole numbers": changed("conv1.weight", lambda value: value.long()),
    "complex numbers": changed("conv1.weight", lambda value: value.to(torch.complex64)),
    "yes and no": changed("fc.bias", lambda value: value > 0),
    "not numbers": changed("fc.bias", lambda value: value * math.nan),
    "an infinity": changed("bn1.running_var", lambda value: value + math.inf),
}


@pytest.mark.parametrize("name", FILES)
def test_a_malformed_file_of_weights_is_refused(name: str, exported: Path) -> None:
    (exported / WEIGHTS).write_bytes(FILES[name])
    with pytest.raises(ValueError, match=r"model\.safetensors` must hold weights"):
        load_pruned(exported)
    path = Path("checkpoint.safetensors")
    path.write_bytes(FILES[name])
    with pytest.raises(ValueError, match="must hold weights only"):
        load_checkpoint(build_model("resnet20", num_classes=10), path)
    assert not run_code()


@pytest.mark.parametrize("where", [-1, 8, 100, 0.5])
def test_weights_that_are_cut_short_are_refused(where: float, exported: Path) -> None:
    data = (exported / WEIGHTS).read_bytes()
    (exported / WEIGHTS).write_bytes(data[: int(where if abs(where) >= 1 else where * len(data))])
    with pytest.raises(ValueError, match="must hold weights"):
        load_pruned(exported)


@pytest.mark.parametrize("name", STATES)
def test_weights_of_another_model_are_refused(
    name: str, exported: Path, pruned: nn.Module
) -> None:
    save_file(STATES[name](copy_state(pruned)), exported / WEIGHTS)
    with pytest.raises(ValueError, match="(?s)the weights must fit the recipe"):
        load_pruned(exported)


def test_weights_that_are_no_file_are_refused(exported: Path) -> None:
    (exported / WEIGHTS).unlink()
    for make in (lambda path: None, Path.mkdir):
        make(exported / WEIGHTS)
        with pytest.raises(ValueError, match="must hold weights"):
            load_pruned(exported)


# --- checkpoints -----------------------------------------------------------------------------


def zipped(pickled: bytes) -> bytes:
    """As `torch.save` writes it, around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def tarred(pickled: bytes) -> bytes:
    """As torch wrote it before version 0.1.10."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(pickled)
            archive.addfile(info, io.BytesIO(pickled))
    return buffer.getvalue()


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def checkpoints(good: dict[str, Tensor]) -> dict[str, bytes]:
    whole = saved(good)
    damaged = {
        "empty": b"",
        "one byte": b"P",
        "text": b"weights",
        "half": whole[: len(whole) // 2],
        "without its end": whole[:-30],
        "a changed index": whole[:-60] + bytes(b ^ 0xFF for b in whole[-60:]),
        "a list": saved([1, 2]),
        "a number": saved(3),
        "texts": saved({"conv1.weight": "evil"}),
        "numbers for names": saved({1: torch.zeros(1)}),
        "a nested text": saved({"state_dict": {"conv1.weight": "evil"}}),
        "a module": saved(nn.Linear(2, 2)),
        "another model": saved(nn.Linear(2, 2).state_dict()),
        "sparse": saved(good | {"fc.weight": good["fc.weight"].to_sparse()}),
        "complex": saved(good | {"fc.bias": good["fc.bias"].to(torch.complex64)}),
        "without data": saved(good | {"fc.bias": good["fc.bias"].to("meta")}),
        "not numbers": saved(good | {"fc.bias": good["fc.bias"] * math.nan}),
        "a payload": saved({"fc.bias": Payload()}),
    }
    for name, pickled in PICKLES.items():
        damaged |= {f"{name}, plain": pickled, f"{name}, zipped": zipped(pickled)}
    legacy = pickle.dumps(0x1950A86A20F9469CFC6C) + pickle.dumps(1001) + pickle.dumps({})
    damaged["a payload after the old magic"] = legacy + PICKLES["protocol 2"]
    damaged["a payload in a tar"] = tarred(PICKLES["protocol 2"])
    return damaged


def test_a_malformed_checkpoint_is_one_message_and_runs_nothing(
    dense: nn.Module, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(
        "model: {name: resnet20, checkpoint: evil.pt}\ndata: {name: digits, image_size: 8}\n"
    )
    for name, content in checkpoints(copy_state(dense)).items():
        Path("evil.pt").write_bytes(content)
        ended = invoke("check", "config.yaml")
        assert ended.code == 2 and "model.checkpoint" in ended.err, (name, ended)
        assert not run_code(), name


def test_the_payloads_would_run() -> None:
    """Or the tests prove nothing. Nothing is read from disk: the bytes are this test's own."""
    for name, pickled in PICKLES.items():
        made = pickle.loads(pickled)
        if isinstance(made, io.IOBase):
            made.close()
        assert run_code(), name


# --- what waits and what is shared ------------------------------------------------------------


@pytest.fixture(scope="module")
def context(dense: nn.Module, plan: PruningPlan) -> TrialContext:
    config = parse_config(
        {"model": {"name": "resnet20"}, "data": {"name": "digits", "image_size": 8, "limit": 240}}
    )
    task: ClassificationTask = make_task(config, load_images(config), "cpu")
    return TrialContext(config, task, copy.deepcopy(dense), plan, 0.5, None)


RUNGS = {
    "nothing": ("", b""),
    "a list": ("[]", b""),
    "deep": ("[" * 100_000, b""),
    "an unknown group": ('{"dropped_blocks": [], "kept": {"evil": [0]}}', b""),
    "an unknown block": ('{"dropped_blocks": ["evil"], "kept": {}}', b""),
    "the whole model": ('{"dropped_blocks": [""], "kept": {}}', b""),
    "negative channels": ('{"dropped_blocks": [], "kept": {"conv1": [-1]}}', b""),
    "gigantic channels": ('{"dropped_blocks": [], "kept": {"conv1": [9999999999999]}}', b""),
    "infinite channels": ('{"dropped_blocks": [], "kept": {"conv1": [Infinity]}}', b""),
    "no channels": ('{"dropped_blocks": [], "kept": {"conv1": []}}', b""),
    "kept in a list": ('{"dropped_blocks": [], "kept": [1]}', b""),
    "no weights": ('{"dropped_blocks": [], "kept": {}}', b""),
    "damaged weights": ('{"dropped_blocks": [], "kept": {}}', FILES["a header of 2**63 bytes"]),
    "pickled weights": ('{"dropped_blocks": [], "kept": {}}', PICKLES["protocol 2"]),
    "other weights": (
        '{"dropped_blocks": [], "kept": {}}',
        save({"model.evil": torch.zeros(1), "training.step": torch.zeros(1)}),
    ),
}


@pytest.mark.parametrize("name", RUNGS)
def test_a_trial_with_a_malformed_checkpoint_starts_afresh(
    name: str, context: TrialContext
) -> None:
    with pytest.warns(UserWarning, match="t00001 starts afresh"):
        assert take_up(lambda: RUNGS[name], "t00001", 1, context) is None
    assert not run_code()


def entry(**changes: Any) -> bytes:
    packed = json.loads(Packed.of(KEY, {"accuracy": 1}, b"").entry)
    return json.dumps(packed | changes).encode()


ENTRIES = {
    "empty": b"",
    "cut": b'{"name":',
    "a list": b"[]",
    "null": b"null",
    "deep": b"[" * 100_000,
    "not UTF-8": b"\xff",
    "a pickle": PICKLES["protocol 2"],
    "of another name": entry(name="scores-" + "0" * 24),
    "of another key": entry(key={"kind": "scores"}),
    "of another content": entry(info={"accuracy": 2}),
    "without its checksum": entry(checksum=None),
    "with facts in a list": entry(info=[]),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_malformed_shared_result_is_made_again(name: str, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shared")
    shelf.put(address(KEY), Packed.of(KEY, {}, b""))
    (shelf.folder / address(KEY) / ENTRY).write_bytes(ENTRIES[name])
    assert shelf.get(address(KEY)) is None and not (shelf.folder / address(KEY)).exists()
    assert not run_code()


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to(path.name)])
@pytest.mark.parametrize("file", ["", ENTRY])
def test_a_shared_result_that_is_no_file_is_made_again(
    make: Callable[[Path], Any], file: str, tmp_path: Path
) -> None:
    shelf = Shelf(tmp_path / "shared")
    path = shelf.folder / address(KEY) / file
    path.parent.mkdir(parents=True)
    make(path)
    assert shelf.get(address(KEY)) is None
    shelf.put(address(KEY), Packed.of(KEY, {}, b""))
    assert shelf.get(address(KEY)) is not None


def test_tensors_that_others_packed_are_refused_by_name(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shared")
    for name, content in FILES.items():
        if content:
            packed = Packed.of(KEY, {}, content)
            shelf.put(address(KEY), packed)
            assert (shelf.folder / address(KEY) / TENSORS).exists()
            with pytest.raises(ConfigError, match=rf"shared/{address(KEY)}` must hold tensors"):
                Made.unpack(packed)
        assert not run_code(), name
