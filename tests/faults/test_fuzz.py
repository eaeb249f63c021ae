"""What hypothesis makes up: every reader returns what is sound or refuses by name, and no more."""

from __future__ import annotations

import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.payload import run_code
from helpers import SMALL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from test_data import write_cifar, write_idx

from prunesearch.methods.data.cifar import read_cifar10
from prunesearch.methods.data.fashion_mnist import read_idx
from prunesearch.methods.models.build import build_model, load_checkpoint
from prunesearch.methods.shapes import rebuild
from prunesearch.methods.surgery import Recipe
from prunesearch.search.config import ConfigError, load_config, parse_config
from prunesearch.search.export import RECIPE, read_recipe
from prunesearch.search.records import TrialResult, TrialStatus
from prunesearch.search.runs import Run
from prunesearch.search.shelf import ENTRY, Packed, Shelf, address
from prunesearch.search.store import Store

settings.register_profile(
    "faults",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=150,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("faults")

KEY = {"kind": "scores"}
YAML_PARTS = st.sampled_from(
    ["{", "}", "[", "]", ":", ": ", "- ", "\n", "\n  ", "&a ", "*a", "<<: ", "!!", "!x ", "'", '"']
    + ["|", ">", "?", "%", "@", "`", "---", "...", "#", "\t", "\\", "~", ".inf", "0x", "1e9", "\0"]
    + ["model", "name", "search", "trials", "!!python/object/apply:os.system [touch canary]"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "accuracy",
                    "loss",
                    "macs",
                    "model",
                    "name",
                    "kwargs",
                    "num_classes",
                    "attributes",
                ]
                + [
                    "dropped_blocks",
                    "kept",
                    "format",
                    "conv1",
                    "out_channels",
                    "__class__",
                    "info",
                ]
            )
            | st.text(max_size=5),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


def mutated(data: st.DataObject, content: bytes) -> bytes:
    """`content` with a few bytes changed, left out, repeated or put in, or cut short."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(changed) - 1, 0)))
        match data.draw(st.sampled_from(["flip", "cut", "delete", "insert", "repeat"])):
            case "flip" if changed:
                changed[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del changed[at:]
            case "delete":
                del changed[at : at + data.draw(st.integers(1, 16))]
            case "insert":
                changed[at:at] = data.draw(st.binary(min_size=1, max_size=16))
            case "repeat":
                changed[at:at] = changed[at : at + 64]
    return bytes(changed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@given(st.data())
def test_configs(folder: Path, data: st.DataObject) -> None:
    text = SMALL
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        until = at + data.draw(st.integers(0, 12))
        text = text[:at] + data.draw(YAML_PARTS | st.text(max_size=4)) + text[until:]
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        load_config(path)
    except ConfigError as error:
        assert str(path) in str(error)
    assert not run_code()


@given(
    st.binary(max_size=200) | st.lists(YAML_PARTS, max_size=20).map(lambda p: "".join(p).encode())
)
def test_files_that_are_no_config(folder: Path, content: bytes) -> None:
    path = folder / "other.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        load_config(path)
    assert not run_code()


@given(
    st.sampled_from(["", "search.trials", "model", "space.criteria", "model.kwargs.x", "a.b"])
    | st.text(max_size=12),
    st.lists(YAML_PARTS | st.text(max_size=4), max_size=8).map("".join),
)
def test_overrides(key: str, value: str) -> None:
    base: dict[str, Any] = {"model": {"name": "resnet20"}, "data": {"name": "digits"}}
    try:
        parse_config(base, [f"{key}={value}"])
    except ConfigError as error:
        assert "--set" in str(error)
    assert not run_code()


@given(JSON)
def test_configs_of_any_values(value: Any) -> None:
    for given_value in (
        {"model": value, "data": value},
        {"model": {"name": "resnet20"}, **_flat(value)},
    ):
        try:
            parse_config(given_value)
        except ConfigError:
            continue


def _flat(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"search": value, "space": value}


@given(st.data())
@pytest.mark.filterwarnings("ignore:.*trials.*:UserWarning")
def test_ledgers(folder: Path, data: st.DataObject) -> None:
    store = Store(folder / "run")
    rows = [TrialResult(f"t{n}", TrialStatus.COMPLETED, accuracy=0.5) for n in range(3)]
    for row in rows:
        store.write_trial(row)
    path = store.trials_dir / "t1.parquet"
    path.write_bytes(mutated(data, path.read_bytes()))
    try:
        read = store.read()
    except ConfigError as error:  # it says that a newer version wrote it
        assert "Upgrade" in str(error)
        path.unlink()
        read = store.read()
    sound = [row for row in read if row.trial_id in ("t0", "t2")]
    assert sound == [rows[0], rows[2]] and len(read) <= 3
    store.compact()
    for old in store.trials_dir.iterdir():
        old.unlink()


@given(JSON, JSON)
def test_facts_of_a_run(folder: Path, baseline: Any, times: Any) -> None:
    run = folder / "facts"
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(SMALL)
    (run / "baseline.json").write_text(json.dumps(baseline))
    (run / "times.json").write_text(json.dumps(times))
    for ask in (lambda: Run(run).baseline, lambda: Run(run).times, lambda: Run(run).hypervolume()):
        try:
            ask()
        except ConfigError as error:
            assert str(run) in str(error)


@given(JSON)
def test_recipes(folder: Path, value: Any) -> None:
    for document in (value, {"format": "prune-search/1", "model": value, "dropped_blocks": value,
                             "attributes": value}):  # fmt: skip
        (folder / RECIPE).write_text(json.dumps(document))
        with pytest.raises(ValueError, match=RECIPE):
            read_recipe(folder)
    for text in (json.dumps(value), json.dumps({"dropped_blocks": value, "kept": value})):
        try:
            Recipe.from_json(text)
        except ValueError as error:
            assert "a recipe must be a JSON object" in str(error)


@given(JSON, st.lists(st.text(max_size=6) | st.sampled_from(["layer1.1", "", "fc"]), max_size=2))
@settings(max_examples=40)
def test_attributes(attributes: Any, blocks: list[str]) -> None:
    model = build_model("resnet20", num_classes=10)
    given_attributes = {"conv1": attributes if isinstance(attributes, dict) else {"x": attributes}}
    kinds = {type(module) for module in model.modules()}
    with suppress(ValueError):
        rebuild(model, blocks, given_attributes, model.state_dict())
        assert given_attributes == {"conv1": {}} and not blocks
    assert {type(module) for module in model.modules()} <= kinds | {torch.nn.Identity}


@given(st.data())
@settings(max_examples=60)
def test_weights(folder: Path, data: st.DataObject) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    for name, content in (
        ("a.safetensors", save(model.state_dict())),
        ("a.pt", buffer.getvalue()),
    ):
        path = folder / name
        path.write_bytes(mutated(data, content))
        try:
            load_checkpoint(model, path)
        except ValueError as error:
            assert str(path) in str(error)
        assert not run_code()


@given(st.data())
def test_shared_results(folder: Path, data: st.DataObject) -> None:
    shelf, packed = Shelf(folder / "shared"), Packed.of(KEY, {"a": 1}, b"tensors")
    shelf.put(address(KEY), packed)
    path = shelf.folder / address(KEY) / ENTRY
    path.write_bytes(mutated(data, packed.entry))
    found = shelf.get(address(KEY))
    assert found is None or found.info == {"a": 1}


@given(st.data())
def test_idx_files(folder: Path, data: st.DataObject) -> None:
    path = folder / "images"
    write_idx(path, torch.zeros(3, 4, 4, dtype=torch.uint8).numpy())
    path.write_bytes(mutated(data, path.read_bytes()))
    try:
        assert read_idx(path).dtype == torch.uint8
    except ValueError as error:
        assert "data.root" in str(error)


@given(st.data())
def test_cifar_files(folder: Path, data: st.DataObject) -> None:
    root = folder / "cifar"
    if not root.exists():
        write_cifar(root, 10)
    path = root / "cifar-10-batches-py" / "batches.meta"
    content = path.read_bytes()
    path.write_bytes(mutated(data, content))
    try:
        read_cifar10(root)
    except ValueError as error:
        assert "data.root" in str(error)
    finally:
        path.write_bytes(content)
    assert not run_code()
