"""Plug-ins: the template is installed for real; broken and clashing ones are named, not fatal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PRUNE_SEARCH, forget_user_code

from prunesearch.methods import plugins as plugins_module
from prunesearch.methods.criteria import CRITERIA, needs, score_channels
from prunesearch.methods.data import DATASETS, load_data
from prunesearch.methods.models import MODELS
from prunesearch.methods.models.build import build_model, model_names
from prunesearch.methods.plugins import listed, plugins

TEMPLATE = Path(__file__).parents[1] / "examples" / "plugin"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which a copy of the template is installed, as a user would."""
    copy, target = tmp_path_factory.mktemp("plugin") / "mine", tmp_path_factory.mktemp("site")
    shutil.copytree(TEMPLATE, copy, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    options = ["--no-build-isolation", "--no-deps", "--target", str(target), str(copy)]
    if uv := shutil.which("uv"):
        install = [uv, "pip", "install", "-q", "--offline", "--python", sys.executable]
    else:
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-index"]
    done = subprocess.run([*install, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shutil.copy(TEMPLATE / "config.yaml", target)
    shutil.copytree(TEMPLATE / "tests", target / "tests")
    return target


def run(site: Path, *args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command line with that folder on the path."""
    return subprocess.run(
        [*PRUNE_SEARCH, *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"PYTHONPATH": str(site), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
    )


def test_the_template_is_listed_checked_and_searched(site: Path, tmp_path: Path) -> None:
    listing = json.loads(run(site, "models", "--json").stdout)
    assert listing["plug-in models"] == {
        "tiny_net": "A residual network of a few thousand weights. "
        "Plug-in of prune-search-example 0.1.0."
    }
    methods = json.loads(run(site, "methods", "--json").stdout)
    assert "largest absolute weight" in methods["plug-in criteria"]["largest_weight"]
    assert "balanced" in methods["plug-in tasks"]
    datasets = json.loads(run(site, "datasets", "--json").stdout)
    assert "400 grey squares" in datasets["plug-in datasets"]["squares"]
    config = str(site / "config.yaml")
    checked = run(site, "check", config, "--json")
    assert checked.returncode == 0, checked.stderr
    report = json.loads(checked.stdout)
    assert report["task"] == "balanced"
    assert [group["name"] for group in report["groups"]][0] == "stem"
    done = run(site, "run", config, "--out", str(tmp_path / "run"), "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(run(site, "front", str(tmp_path / "run"), "--json").stdout)
    assert rows["front"]


def test_the_template_s_own_test_passes(site: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(site / "tests")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=site,
        env=os.environ | {"PYTHONPATH": str(site)},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def fake_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder on the path, in which tests put metadata of distributions."""
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins_module._found.cache_clear()
    yield tmp_path
    plugins_module._found.cache_clear()
    forget_user_code()


def _distribute(site: Path, name: str, entries: str, code: str = "") -> None:
    """What pip would leave: metadata of a distribution, and its module `my_NAME`."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)
    (site / f"my_{name}.py").write_text(code)


def test_a_broken_plug_in_is_one_warning_that_names_its_distribution(fake_site: Path) -> None:
    _distribute(
        fake_site,
        "broken",
        "[prunesearch.models]\nnet = my_broken:net\n\n[prunesearch.datasets]\nx = my_broken:x\n",
        "raise ImportError('no CUDA here')",
    )
    lines, said = listed("models", MODELS)
    assert lines == {"net": "cannot be loaded. Plug-in of broken 1.0."}
    assert len(said) == 1
    assert "my_broken:net of broken 1.0 stopped with ImportError: no CUDA here" in said[0]
    with pytest.raises(ValueError, match="`model.name` .=net. must be a plug-in.*broken 1.0"):
        build_model("net", num_classes=2)
    with pytest.raises(ValueError, match="`data.name` .=x. must be a plug-in.*uninstall"):
        load_data("x")
    shown = run(fake_site, "models")
    assert shown.returncode == 0 and "resnet20" in shown.stdout
    assert "broken 1.0 stopped with ImportError" in shown.stderr
    assert "Traceback" not in shown.stderr


def test_only_what_is_asked_for_is_imported(fake_site: Path) -> None:
    _distribute(fake_site, "lazy", "[prunesearch.models]\nlazy_net = my_lazy:net\n", "1 / 0")
    assert "lazy_net" in model_names()
    assert build_model("resnet20", num_classes=2)
    assert "my_lazy" not in sys.modules


def test_names_that_clash_are_refused(fake_site: Path) -> None:
    _distribute(fake_site, "one", "[prunesearch.models]\nresnet20 = my_one:f\nboth = my_one:f\n")
    _distribute(fake_site, "two", "[prunesearch.models]\nboth = my_two:f\n")
    assert plugins("models", MODELS) == {}
    lines, said = listed("models", MODELS)
    assert lines == {}
    assert any("resnet20) stays prune-search's own" in text and "one 1.0" in text for text in said)
    assert any("one 1.0 and two 1.0 both offer it" in text for text in said)
    assert sum(p.numel() for p in build_model("resnet20", num_classes=10).parameters()) > 200_000


def test_a_plug_in_s_criterion_is_held_to_the_form(fake_site: Path) -> None:
    code = (
        "import torch\n"
        "def short(model, task, layers, *, generator):\n"
        "    return {layer: torch.ones(1) for layer in layers}\n"
        "def few(model, task, layers, *, generator, power: float = 1.0):\n"
        "    return {}\n"
        "few.needs = 'nothing'\n"
    )
    names = "short = my_bad:short\nfew = my_bad:few\n"
    _distribute(fake_site, "bad", f"[prunesearch.criteria]\n{names}", code)
    model = build_model("resnet20", num_classes=10)
    assert needs("few") == "nothing" and needs("short") == "labels"
    with pytest.raises(ValueError, match=r"float32 scores >= 0 on the CPU, \[16\]"):
        score_channels("short", model, None, ["conv1"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scored 0 of 1"):
        score_channels("few", model, None, ["conv1"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="few.power.*must be of type float"):
        score_channels("few", model, None, ["conv1"], options={"power": "x"})  # type: ignore[arg-type]
    assert "few" not in CRITERIA


def test_data_from_a_module(fake_site: Path) -> None:
    (fake_site / "my_data.py").write_text(
        "import torch\n"
        "from prunesearch.methods.data import own_images\n"
        "def read(root):\n"
        "    labels = torch.arange(60) % 3\n"
        "    return torch.zeros(60, 1, 4, 4, dtype=torch.uint8), labels, ['a', 'b', 'c']\n"
        "def good():\n"
        "    return own_images(read, description='nothing', image_size=4)\n"
        "def floats():\n"
        "    return own_images(lambda r: (torch.zeros(9, 1, 4, 4), torch.zeros(9).long(), 'a'),\n"
        "        description='wrong', image_size=4)\n"
        "def wrong():\n"
        "    return 5\n"
        "def fails():\n"
        "    raise OSError('no disk')\n"
    )
    data = load_data("my_data:good", channels=1)
    assert data.name == "my_data:good" and data.image_shape == (1, 4, 4)
    assert len(data.train) + len(data.val) + len(data.test) == 60
    for name, message in (
        ("my_data:floats", "must be uint8"),
        ("my_data:wrong", "must be a DatasetEntry"),
        ("my_data:fails", "stopped with OSError: no disk"),
        ("my_data:absent", "must be a known name"),
        ("os:getcwd", "standard library"),
    ):
        with pytest.raises(ValueError, match=message):
            load_data(name)
    assert "my_data:good" not in DATASETS
