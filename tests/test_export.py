"""An export as a whole: proven files, card and loader, or nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Invoke
from made_runs import weights_run
from safetensors.torch import load_file, save_file

from prunesearch.search import ConfigError, Run, load_pruned
from prunesearch.search.export import ExportError, read_export
from prunesearch.search.model_card import wilson_interval
from prunesearch.search.setup import load_images, make_task

ALWAYS = {"recipe.json", "model.safetensors", "export.json", "README.md", "load.py"}
BRANCHY = ("model.name=made_runs:Branchy", "space.blocks.mode=none")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return weights_run(
        tmp_path_factory.mktemp("run") / "made",
        "model.licence=Apache-2.0",
        blocks=("layer1.1", "layer3.2"),
    )


@pytest.fixture(scope="module")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "member"
    return run.export(out, trial="t00000", formats=["onnx", "pt2"])


@pytest.fixture(scope="module")
def plain(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default format, of a run whose dense weights are gone."""
    folder = tmp_path_factory.mktemp("plain")
    bare = Run(shutil.copytree(run.folder, folder / "run"))
    (bare.folder / "weights" / "dense.safetensors").unlink()
    return bare.export(folder / "member", trial="t00000")


def test_the_folder_holds_what_was_asked_and_nothing_else(exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == ALWAYS | {"model.onnx", "model.pt2"}
    assert [path.name for path in exported.parent.iterdir()] == ["member"]


def test_export_json_says_what_the_proof_measured(exported: Path, run: Run) -> None:
    found = read_export(exported)
    assert found["asked"] == ["onnx", "pt2"]
    assert set(found["forms"]) == {"safetensors", "onnx", "pt2"}
    for form in found["forms"].values():
        content = (exported / form["file"]).read_bytes()
        assert form["num_bytes"] == len(content)
        assert 0 <= form["difference"] <= form["allowed"] < form["largest_output"]
    assert found["forms"]["onnx"]["runtime"].startswith("onnxruntime ")
    settings = found["settings"]
    assert (settings["runs"], settings["threads"], settings["images_compared"]) == (20, 1, 64)
    assert found["environment"]["libraries"]["torch"] == torch.__version__.partition("+")[0]


def test_test_figures_are_those_of_the_files(exported: Path, run: Run) -> None:
    recipe = json.loads((exported / "recipe.json").read_text())
    task = make_task(run.config, load_images(run.config), "cpu")
    figures = task.evaluate(load_pruned(exported), "test")
    assert {name: recipe["test"][name] for name in figures} == figures
    count = recipe["test"]["num_images"]
    assert count == len(task.data.test) == recipe["data"]["test"]
    assert recipe["test"]["interval_95"] == list(wilson_interval(figures["accuracy"], count))
    dense = load_file(run.folder / "weights" / "dense.safetensors")
    from prunesearch.methods.models.build import build_model

    model = build_model("resnet20", num_classes=10)
    model.load_state_dict(dense)
    assert recipe["dense_test"]["accuracy"] == task.evaluate(model, "test")["accuracy"]
    assert recipe["channels"]["conv1"] == {"dense": 16, "kept": 8}
    assert not any(name.startswith("layer1.1.") for name in recipe["channels"])


def test_the_card_tells_it(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    export = read_export(exported)
    for text in (
        "# resnet20, pruned", "Trial t00000", "Blocks: 2 (layer1.1, layer3.2)", "95 % interval",
        "| conv1 | 16 | 8 |", "weights: Apache-2.0.", "opset 18", "model.pt2", "from load import",
        f"{export['forms']['onnx']['latency_ms']:.3f}", "A CPU", torch.__version__,
    ):  # fmt: skip
        assert text in card, text


def alone(folder: Path, code: str, tmp_path: Path) -> np.ndarray:
    """Outputs of `code` in a process that has only the export's folder, for `images`."""
    given, answer = tmp_path / "images.npy", tmp_path / "outputs.npy"
    script = (
        "import sys, numpy\n"
        f"sys.path.insert(0, {str(folder)!r})\n"
        f"images = numpy.load({str(given)!r})\n"
        f"{code}\n"
        f"numpy.save({str(answer)!r}, outputs)\n"
    )
    rng = np.random.default_rng(0)
    np.save(given, rng.normal(size=(5, 3, 8, 8)).astype(np.float32))
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return np.load(answer)


TORCH = (
    "import torch\nwith torch.inference_mode(): outputs = load.{call}(torch.from_numpy(images))"
)
LOADERS = {
    "onnx": (
        "import load\noutputs = load.load()(images)",
        ["torch", "onnx", "prunesearch"],
    ),
    "pt2": (
        "import load\n" + TORCH.format(call="load_pt2()"),
        ["prunesearch", "onnx", "onnxruntime", "torchvision"],
    ),
    "safetensors": (
        "import load\n" + TORCH.format(call="load()"),
        ["prunesearch.search", "ray", "optuna", "torch_pruning", "pandas", "onnx"],
    ),
}


@pytest.mark.parametrize("form", LOADERS)
def test_load_py_alone(form: str, exported: Path, plain: Path, tmp_path: Path) -> None:
    """Each form by its own few lines, in a process without what they do not need."""
    code, needless = LOADERS[form]
    check = f"\nassert not {set(needless)!r} & set(sys.modules), sorted(sys.modules)"
    outputs = alone(plain if form == "safetensors" else exported, code + check, tmp_path)
    with torch.inference_mode():
        images = torch.from_numpy(np.load(tmp_path / "images.npy"))
        expected = load_pruned(exported)(images).numpy()
    assert np.abs(outputs - expected).max() <= 1e-4 * np.abs(expected).max()


def test_load_py_is_short(exported: Path, run: Run, tmp_path: Path) -> None:
    from prunesearch.search.load_script import load_script

    for form in LOADERS:
        lines = load_script([form]).splitlines()
        assert len([line for line in lines if line and '"""' not in line]) <= 10
        compile("\n".join(lines), "load.py", "exec")
    assert (exported / "load.py").read_text() == load_script(["onnx", "pt2"])


# --- refused ---------------------------------------------------------------------------------


def test_a_form_that_cannot_be_written_leaves_nothing(tmp_path: Path, invoke: Invoke) -> None:
    run = weights_run(tmp_path / "run", *BRANCHY)
    out = tmp_path / "place" / "exported"
    code, _, err = invoke(
        "export", run.folder, "--trial", "t00000", "--format", "pt2", "--out", out
    )
    assert code == 1 and "cannot be written as pt2" in err and "Traceback" not in err
    assert list(out.parent.iterdir()) == []
    folder = run.export(out, trial="t00000")  # as safetensors it can be
    with pytest.raises(ValueError, match="run_code"):
        load_pruned(folder)
    assert isinstance(load_pruned(folder, run_code=True), torch.nn.Module)
    assert "model = load(run_code=True)" in (folder / "README.md").read_text()


def test_outputs_that_are_not_numbers_leave_nothing(run: Run, tmp_path: Path) -> None:
    """Weights of infinity load, and prove nothing."""
    broken = Run(shutil.copytree(run.folder, tmp_path / "run"))
    path = broken.folder / "weights" / "t00000.safetensors"
    weights = load_file(path)
    weights["fc.bias"][0] = torch.inf
    save_file(weights, path)
    with pytest.raises(ExportError, match="finite"):
        broken.export(tmp_path / "place" / "out", trial="t00000")
    assert list((tmp_path / "place").iterdir()) == []


def test_without_the_dense_weights_the_card_says_so(plain: Path) -> None:
    assert {path.name for path in plain.iterdir()} == ALWAYS
    assert "not evaluated |" in (plain / "README.md").read_text()


def test_the_command_chooses_and_sums_up(run: Run, tmp_path: Path, invoke: Invoke) -> None:
    out = tmp_path / "exported"
    code, printed, err = invoke(
        "export", run.folder, "--choose", "fastest under 3 ms", "--format", "pt2",
        "--out", out, "--json",
    )  # fmt: skip
    assert code == 0, err
    summary = json.loads(printed)
    assert summary["trial"] == "t00000" and "95 % interval" in summary["test accuracy"]
    assert "model.pt2: difference" in summary["pt2"] and "eager beside it" in summary["pt2"]
    assert {path.name for path in out.iterdir()} == ALWAYS | {"model.pt2"}
    code, _, err = invoke("export", run.folder, "--knee", "--out", out)
    assert code == 2 and "--out" in err


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        ([], "must be given"),
        (["--trial", "t00000", "--knee"], "must not be combined"),
        (["--trial", "t00000", "--where", "macs<1"], "ignored"),
        (["--min", "macs", "--choose", "knee"], "must not be combined"),
        (["--where", "macs<1"], "must stand beside"),
        (["--choose", "good"], "--choose"),
        (["--knee", "--format", "tflite"], "safetensors, pt2, onnx"),
        (["--trial", "t00099"], "must be a trial of"),
        (["--choose", "fastest under 1 ms"], "closest is trial t00000"),
    ],
)
def test_wrong_arguments_exit_2(
    arguments: list[str], piece: str, run: Run, tmp_path: Path, invoke: Invoke
) -> None:
    out = tmp_path / "out"
    code, _, err = invoke("export", run.folder, "--out", out, *arguments)
    assert code == 2 and piece in err and "Traceback" not in err
    assert not out.exists()


def test_a_member_whose_weights_are_gone(tmp_path: Path) -> None:
    from made_runs import rows_run

    with pytest.raises(ConfigError, match="only their weights are kept"):
        rows_run(tmp_path / "run").export(tmp_path / "out", knee=True)
