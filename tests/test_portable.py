"""Exports as .pt2 and ONNX: ten pruned architectures, and everything that must be refused."""

from __future__ import annotations

import copy
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from made_runs import Branchy

from prunesearch.search import ConfigError
from prunesearch.search.bench.export import (
    SIZES,
    Cut,
    bench_export,
    cut_model,
    export_markdown,
    export_table,
    write_cut,
)
from prunesearch.search.export_proof import TOLERANCES, Proof, Timing, Unproven, prove, proven
from prunesearch.search.portable import (
    FILES,
    FORMATS,
    OPSET,
    ExportError,
    check_formats,
    write_forms,
)

ALIKE = {"torchvision:mobilenet_v2", "torchvision:googlenet"}  # others here are built as these are
MODELS = [name for name in SIZES if name not in ALIKE]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """The architectures, written here and proven by one fresh process."""
    return bench_export(MODELS, runs=10)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_process_gets_the_pruned_models_outputs(
    name: str, form: str, result: dict[str, Any]
) -> None:
    found = next(row for row in result["rows"] if row["model"] == name)
    assert found["params"] < found["dense_params"]
    assert found["channels_left"] < found["channels"] or found["dropped_blocks"]
    proof = found["forms"][form]
    assert not isinstance(proof, str), proof
    assert proof["largest_output"] > 1e-3  # or any difference would be a small one
    assert proof["difference"] <= TOLERANCES[form] * proof["largest_output"] == proof["allowed"]
    assert proof["file"] == FILES[form]
    assert proof["num_bytes"] > 3.9 * found["params"]  # ONNX folds batch norms into weights
    if form == "safetensors":
        assert proof["latency_ms"] is None
    else:
        assert proof["latency_ms"] > 0 < proof["eager_ms"] and proof["speedup"] > 0
    assert proof["opset"] == (OPSET if form == "onnx" else None)


def test_all_lose_channels_and_most_lose_blocks(result: dict[str, Any]) -> None:
    assert len(result["rows"]) == len(MODELS) >= 10
    assert all(row["channels_left"] < row["channels"] for row in result["rows"])
    assert sum(row["dropped_blocks"] > 0 for row in result["rows"]) >= 5


def test_the_report_says_what_was_measured(result: dict[str, Any]) -> None:
    table, text = export_table(result), export_markdown(result)
    assert table.row_count == len(MODELS)
    for row in result["rows"]:
        line = next(line for line in text.splitlines() if line.startswith(f"| {row['model']} |"))
        cells = line.split(" | ")
        assert cells[-3] == f"{row['forms']['onnx']['eager_ms']:.2f}"
        assert cells[-1].split(" ")[0] == f"{row['forms']['onnx']['latency_ms']:.2f}"
    assert result["environment"]["cpu"] in text and "load average" in text


def test_a_form_that_failed_is_in_the_report_with_its_reason(result: dict[str, Any]) -> None:
    rows = copy.deepcopy(result["rows"][:1])
    rows[0]["forms"]["onnx"] = "it has no operator for that"
    text = export_markdown(result | {"rows": rows})
    assert f"{rows[0]['model']}, onnx: it has no operator for that" in text
    assert " | no |" in text


def test_a_model_that_is_not_in_the_table() -> None:
    with pytest.raises(ValueError, match="`--models` .=alexnet. must be among resnet20, "):
        bench_export(["alexnet"])


# --- one small model: what is in the files, and what is refused ------------------------------


@pytest.fixture(scope="module")
def cut() -> Cut:
    return cut_model("resnet20", 8)


@pytest.fixture(scope="module")
def written(cut: Cut, tmp_path_factory: pytest.TempPathFactory) -> Unproven:
    export, refused = write_cut(cut, tmp_path_factory.mktemp("export"))
    assert not refused
    return export


def test_the_batch_is_free_and_named(written: Unproven) -> None:
    model = onnx.load(written.folder / FILES["onnx"])
    ends = (model.graph.input[0], "images", [3, 8, 8]), (model.graph.output[0], "output", [10])
    for value, name, rest in ends:
        dims = value.type.tensor_type.shape.dim
        assert (value.name, dims[0].dim_param) == (name, "batch")
        assert [dim.dim_value for dim in dims[1:]] == rest
    assert {
        one.domain: one.version for one in onnx.load(written.folder / FILES["onnx"]).opset_import
    }[""] == OPSET


def test_no_folder_of_this_machine_is_in_the_files(written: Unproven) -> None:
    import torchvision

    places = [str(Path(__file__).parents[1]), str(Path(torchvision.__file__).parents[1])]
    for name in FILES.values():
        content = (written.folder / name).read_bytes()
        assert len(content) > 10_000
        for place in (*places, "site-packages", "resnet_cifar.py"):
            assert place.encode() not in content, (name, place)


def test_no_pickle_and_no_image_is_in_a_pt2(written: Unproven) -> None:
    with zipfile.ZipFile(written.folder / FILES["pt2"]) as archive:
        contents = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    samples = [data for name, data in contents.items() if name.startswith("data/sample_inputs")]
    assert samples and not any(samples)
    weights = next(v for k, v in contents.items() if k.endswith("weights_config.json"))
    entries = json.loads(weights)["config"]
    assert len(entries) > 50 and not any(entry["use_pickle"] for entry in entries.values())


def test_what_is_not_the_model_is_refused(cut: Cut, written: Unproven, tmp_path: Path) -> None:
    """Another model, NaN, damaged files, a missing one: each with its reason, the rest proven."""
    other, broken = copy.deepcopy(cut.pruned), copy.deepcopy(cut.pruned)
    with torch.no_grad():
        other.fc.bias[3] += 0.01 * float(cut.pruned(cut.images).abs().max())
        broken.fc.bias[3] = torch.nan
    damaged, _ = write_cut(cut, tmp_path / "damaged")
    for name in ("pt2", "onnx"):
        path = damaged.folder / FILES[name]
        path.write_bytes(path.read_bytes()[:2000])
    empty, _ = write_cut(cut, tmp_path / "empty")
    (empty.folder / FILES["safetensors"]).unlink()
    cases = [
        written,
        Unproven(written.folder, FORMATS, other, cut.images),
        Unproven(written.folder, FORMATS, broken, cut.images),
        damaged,
        empty,
    ]
    good, wrong, nan, cut_short, missing = prove(cases, Timing(runs=10))
    assert set(proven(good)) == set(FORMATS)
    for outcomes in (wrong, nan):
        assert all("its outputs differ by" in str(one) for one in outcomes.values()), outcomes
    assert isinstance(cut_short["safetensors"], Proof)
    assert "does not load" in str(cut_short["pt2"]) and "does not load" in str(cut_short["onnx"])
    assert all("must hold weights" in str(one) for one in missing.values())
    with pytest.raises(ExportError, match="the pt2 export is refused.*Nothing was written"):
        proven({name: one for name, one in wrong.items() if name == "pt2"})


def test_a_batch_of_another_size_than_the_trace_is_compared(cut: Cut, tmp_path: Path) -> None:
    """A program traced for two images only would pass with two, and must not here."""
    export, _ = write_cut(cut, tmp_path)
    fixed = torch.export.export(cut.pruned, (cut.images[:2],))
    torch.export.save(fixed, tmp_path / FILES["pt2"])
    found = prove([export], Timing(runs=10))[0]
    assert isinstance(found["pt2"], str) and isinstance(found["onnx"], Proof)


def test_a_model_that_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot be written as pt2 and onnx: .*Use --format"):
        write_forms(Branchy().eval(), ("pt2",), tmp_path, torch.zeros(2, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_formats_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_formats(()) == ("safetensors",)
    assert check_formats(["onnx", "pt2", "onnx"]) == ("onnx", "pt2")
    with pytest.raises(ConfigError, match="`--format` .=tflite. must be one of safetensors, pt2"):
        check_formats(["pt2", "tflite"])
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"onnxscript, not installed .*prune-search\[onnx\]"):
        check_formats(["onnx"])
    assert check_formats(["pt2"]) == ("pt2",)
