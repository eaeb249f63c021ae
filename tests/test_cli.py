"""Wrong input ends with exit code 2 and one message, before Ray starts and without a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import SMALL, Invoke, write_config
from safetensors.torch import save_file
from torch import nn

from prunesearch.search import ConfigError, runs
from prunesearch.search.locks import locked
from prunesearch.search.shelf import Packed, Shelf, address


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, invoke: Invoke, tmp_path: Path) -> Invoke:
    """In an empty folder, and without Ray."""

    def no_ray(*arguments: object) -> None:
        raise AssertionError("Ray was started")

    from prunesearch.search import cluster

    monkeypatch.setattr(cluster, "connect", no_ray)
    monkeypatch.chdir(tmp_path)
    return invoke


class Tiny(nn.Module):
    """No block, and its only layer makes the output."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


def two_outputs() -> nn.Module:
    return Tiny(num_classes=2)


WRONG = {
    "unknown key": (["space.kep.low=0.5"], ["space.kep", "keep"]),
    "unknown model": (["model.name=resnet21"], ["model.name", "resnet21", "resnet20"]),
    "unknown torchvision model": (["model.name=torchvision:resnet19"], ["resnet19", "resnet18"]),
    "unknown module": (["model.name=nowhere:make"], ["model.name", "nowhere"]),
    "unknown criterion": (["space.criteria=[magnitude_l3]"], ["magnitude_l3", "magnitude_l1"]),
    "unknown option": (["space.criteria=[{fgp: {clas_agg: sum}}]"], ["clas_agg", "class_agg"]),
    "unknown objective": (["objectives={acuracy: maximize}"], ["acuracy", "accuracy"]),
    "wrong direction": (["objectives={accuracy: minimize}"], ["accuracy", "maximize"]),
    "unknown data": (["data.name=digit"], ["data.name", "digit", "digits"]),
    "wrong type": (["search.trials=many"], ["search.trials", "many"]),
    "contradictory range": (["space.keep.low=0.9", "space.keep.high=0.5"], ["keep.low", "high"]),
    "missing data folder": (
        ["data.name=image_folder", "data.root=/nowhere/at/all"],
        ["data.root", "/nowhere/at/all"],
    ),
    "missing checkpoint": (["model.checkpoint=none.safetensors"], ["checkpoint", "none.safet"]),
    "nothing prunable": (["model.name=test_cli:Tiny"], ["model.name", "prune"]),
    "wrong outputs": (["model.name=test_cli:two_outputs"], ["model.name", "logits", "10"]),
    "GPU that is not there": (["resources.gpu=1"], ["resources.gpu", "at most 0"]),
    "more cores than there are": (["resources.cpu=512"], ["resources.cpu", "512", "at most"]),
    "a GPU and a half": (["resources.gpu=1.5"], ["resources.gpu", "1.5", "whole"]),
    "option of sparse training": (
        ["space.criteria=[{dsd: {stratgy: both}}]"],
        ["dsd.stratgy", "strategy"],
    ),
    "value out of bounds": (
        ["space.criteria=[{blockwipg: {sigma: -1}}]"],
        ["blockwipg.sigma", "-1", "must be a number from"],
    ),
    "range of Q": (["space.dsd_q={low: 0.8, high: 0.4}"], ["dsd_q.low", "0.8", "high"]),
    "unknown rule": (["space.select=[globl]"], ["space.select", "globl", "global"]),
    "fine-tuned scores of a fixed order": (
        ["space.blocks={order: sequential, score_finetune_epochs: 1}"],
        ["space.blocks.order", "sequential", "greedy", "score_finetune_epochs"],
    ),
    "Q off the grid": (
        ["space.dsd_q={low: 0.3333, high: 0.7, step: 0.1}"],
        ["dsd_q.low", "0.3333", "0.001"],
    ),
    "one lambda of a range": (["space.dsd_lambda.num=1"], ["dsd_lambda.num", "at least 2"]),
    "no epochs": (["space.dsd_epochs=[]"], ["dsd_epochs", "at least 1 item"]),
    "channels drawn and reconstructed": (
        ["space.select=[rand30]", "recover.reconstruct.steps=1"],
        ["space.select", "rand30", "reconstruct"],
    ),
    "exhaustive order of many blocks": (
        ["model.name=resnet56", "space.blocks={order: exhaustive}"],
        ["space.blocks.order", "exhaustive", "24", "greedy"],
    ),
    "wrong constraint": (["constraints=['speed < 1']"], ["constraints", "speed"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_config_exits_2_with_one_message(name: str, invoke: Invoke, tmp_path: Path) -> None:
    overrides, pieces = WRONG[name]
    if name.startswith("GPU") and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    sets = [arg for override in overrides for arg in ("--set", override)]
    code, _, err = invoke("run", write_config(tmp_path), "--out", tmp_path / "out", *sets)
    assert code == 2, err
    assert "Traceback" not in err
    for piece in pieces:
        assert piece in err, err
    assert not (tmp_path / "out").exists()


def test_checkpoint_of_another_shape(invoke: Invoke, tmp_path: Path) -> None:
    save_file(Tiny().state_dict(), tmp_path / "tiny.safetensors")
    code, _, err = invoke(
        "run", write_config(tmp_path), "--out", tmp_path / "out",
        "--set", f"model.checkpoint={tmp_path / 'tiny.safetensors'}",
    )  # fmt: skip
    assert code == 2
    assert "model.checkpoint" in err or "checkpoint" in err
    assert "fc.weight" in err


def test_missing_config_file(invoke: Invoke) -> None:
    code, _, err = invoke("run", "nowhere.yaml")
    assert code == 2
    assert "nowhere.yaml" in err


def test_existing_run_folder_is_refused_with_the_ways_on(invoke: Invoke, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text(SMALL)
    (out / "baseline.json").write_text("{}")
    code, _, err = invoke("run", write_config(tmp_path), "--out", out)
    assert code == 2
    assert "resume" in err and "extend" in err and "--out" in err


def test_unwritable_output(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = invoke("run", write_config(tmp_path), "--out", tmp_path / "file" / "out")
    assert code == 2
    assert "--out" in err


def test_a_run_folder_in_use_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked(out, pytest.fail):
        (out / "config.yaml").write_text(SMALL)
        code, _, err = invoke("resume", out)
    assert code == 2
    assert "another process" in err


def test_a_run_that_ended_before_its_dense_model_can_be_started_again(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(SMALL)
    runs.check_new_folder(tmp_path)
    (tmp_path / "baseline.json").write_text("{}")
    with pytest.raises(ConfigError, match="resume"):
        runs.check_new_folder(tmp_path)


def test_status_before_the_latency_is_known(invoke: Invoke, tmp_path: Path) -> None:
    text = SMALL.replace("macs: minimize", "latency_ms: minimize")
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "baseline.json").write_text('{"accuracy": 0.9, "latency_ms": null}')
    code, out, err = invoke("status", tmp_path, "--json")
    assert code == 0, err
    assert json.loads(out)["hypervolume"] is None


def test_ray_client_is_refused(tmp_path: Path) -> None:
    from prunesearch.search.cluster import connect

    with pytest.raises(ConfigError, match="--address auto"), connect("ray://nowhere:10001"):
        pass


@pytest.mark.parametrize("command", ["status", "front", "resume"])
def test_no_run_folder(command: str, invoke: Invoke, tmp_path: Path) -> None:
    code, _, err = invoke(command, tmp_path / "nothing")
    assert code == 2
    assert "RUN_DIR" in err and "prune-search list" in err


def test_dry_run_and_check_start_nothing(invoke: Invoke, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    code, out, _ = invoke("run", config, "--out", tmp_path / "out", "--dry-run", "--json")
    assert code == 0
    report = json.loads(out)
    assert sum(block["removable"] for block in report["blocks"]) == 6
    assert all(block["removable"] or block["reason"] for block in report["blocks"])
    assert not (tmp_path / "out").exists()
    code, out, _ = invoke("check", config)
    assert code == 0
    assert "layer3.2" in out and "not prunable: fc" in out


def test_user_model_from_the_current_folder(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "my_model.py").write_text(
        "from prunesearch.methods.models.resnet_cifar import resnet20\n"
        "def make(num_classes):\n    return resnet20(num_classes=num_classes)\n"
    )
    code, out, err = invoke(
        "check", write_config(tmp_path), "--set", "model.name=my_model:make", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["num_params"] == 272_474


@pytest.mark.parametrize("command", ["methods", "models", "datasets"])
def test_names_are_listed(command: str, invoke: Invoke) -> None:
    from prunesearch.methods.criteria import CRITERIA
    from prunesearch.methods.data import DATASETS
    from prunesearch.methods.models import MODELS

    names = {"methods": CRITERIA, "models": MODELS, "datasets": DATASETS}[command]
    code, out, _ = invoke(command, "--json")
    assert code == 0
    listed = {name for group in json.loads(out).values() for name in group}
    assert set(names) <= listed
    assert all(line for group in json.loads(out).values() for line in group.values())


def test_ablate_names_the_papers_and_the_tables(invoke: Invoke, tmp_path: Path) -> None:
    code, _, err = invoke("ablate", "dds", "5")
    assert code == 2 and "`PAPER` (=dds)" in err and "Did you mean `dsd`?" in err
    code, _, err = invoke("ablate", "fgp", "fig3c")
    assert code == 2 and "`TABLE` (=fig3c)" in err and "fig3a" in err
    code, _, err = invoke("ablate", "dsd", "5", "--set", "ablate.sedes=2")
    assert code == 2 and "ablate.sedes" in err and "seeds" in err
    code, _, err = invoke("ablate", "dsd", "5", "--config", tmp_path / "none.yaml")
    assert code == 2 and "none.yaml" in err


def test_an_ablation_is_no_run_and_no_place_for_one(invoke: Invoke, tmp_path: Path) -> None:
    folder = tmp_path / "ablated"
    folder.mkdir()
    (folder / "study.json").write_text('{"paper": "dsd", "table": "5"}')
    (folder / "ablation.yaml").write_text(SMALL)
    code, _, err = invoke("run", write_config(tmp_path), "--out", folder, "--dry-run")
    assert code == 2 and "--out" in err
    code, _, err = invoke("resume", folder)
    assert code == 2 and "RUN_DIR" in err
    code, out, _ = invoke("list", tmp_path, "--json")
    assert code == 0 and out.strip() == "[]"
    (tmp_path / "file").touch()
    code, _, err = invoke("ablate", "dsd", "5", "--out", tmp_path / "file")
    assert code == 2 and "--out" in err and "folder" in err
    code, _, err = invoke("ablate", "fgp", "3", "--set", "ablate.k=[]")
    assert code == 2 and "ablate.k" in err


def test_sparse_needs_a_run_with_sparse_training(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(SMALL)
    code, _, err = invoke("sparse", tmp_path / "run")
    assert code == 2 and "sparse training" in err and "dsd" in err


def test_cache_shows_what_runs_share_and_clears_it(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key = {"kind": "scores", "criterion": "fgp"}
    monkeypatch.setenv("PRUNE_SEARCH_CACHE", str(tmp_path / "cache"))
    Shelf(tmp_path / "cache" / "results").put(address(key), Packed.of(key, {}, bytes(2**20)))
    code, out, _ = invoke("cache")
    assert code == 0 and "1 scores" in out and "1.0 MiB" in out
    assert str(tmp_path) in out.replace("\n", "")
    code, out, _ = invoke("cache", "--clear", "--json")
    assert code == 0 and json.loads(out)["kinds"] == {}
    assert not list((tmp_path / "cache" / "results").glob("scores-*"))
