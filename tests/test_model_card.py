"""The card beside an export."""

from __future__ import annotations

from typing import Any

import pytest
from scipy.stats import binomtest

from prunesearch.search.model_card import model_card, wilson_interval


@pytest.mark.parametrize(("right", "count"), [(9, 10), (540, 600), (0, 20), (20, 20), (1, 1)])
def test_the_interval_is_wilsons(right: int, count: int) -> None:
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right / count, count) == pytest.approx(tuple(expected), abs=1e-6)


@pytest.fixture
def recipe() -> dict[str, Any]:
    return {
        "model": {"name": "resnet20", "kwargs": {}, "num_classes": 10},
        "search": "digits-resnet20",
        "metric": "top-1",
        "trial": {
            "trial_id": "t00003", "accuracy": 0.9, "latency_ms": 0.5, "latency_ms_p10": 0.4,
            "latency_ms_p90": None, "speedup": 2.0, "latency_ms_by_probe": {"edge": 3.25},
            "macs": 1000, "num_params": 10, "epochs": 0.5,
            "candidate": {"criterion": "fgp", "select": "cumulative", "k": 0.7},
        },
        "baseline": {
            "accuracy": 0.95, "latency_ms": 1.0, "macs": 2000, "num_params": 20,
            "latency_by_probe": {"edge": {"latency_ms": 8.5, "probe": {"cpu": "An ARM"}}},
            "probe": {
                "cpu": "An EPYC", "torch": "2.15", "batch_size": 1, "threads": 2, "runs": 200,
            },
        },
        "test": {"accuracy": 0.9, "num_images": 1000, "interval_95": [0.8799, 0.9171]},
        "dense_test": {"accuracy": 0.94, "num_images": 1000, "interval_95": [0.9235, 0.9531]},
        "dropped_blocks": ["layer1.1"],
        "channels": {"conv1": {"dense": 16, "kept": 9}, "layer2.0": {"dense": 32, "kept": 32}},
        "recover": {"recalibrate_bn": True, "lr": 0.01, "distill": 0.0},
        "data": {
            "name": "digits", "train": 100, "val": 20, "test": 1000, "official_test": False,
        },
        "input": {"shape": [3, 8, 8], "mean": [0.5], "std": [0.25]},
        "licence": None,
    }  # fmt: skip


@pytest.fixture
def export() -> dict[str, Any]:
    form = {"num_bytes": 4096, "difference": 2e-6, "largest_output": 8.0, "runtime": "torch 2.15"}
    none = {"latency_ms": None, "eager_ms": None, "opset": None}
    timed = {"latency_ms": 0.25, "eager_ms": 0.51, "opset": 18, "runtime": "onnxruntime 1.31"}
    return {
        "asked": ["onnx"],
        "forms": {
            "safetensors": form | none | {"file": "model.safetensors"},
            "onnx": form | timed | {"file": "model.onnx"},
        },
        "settings": {"batch_size": 1, "threads": 2, "runs": 200, "images_compared": 64},
        "environment": {"cpu": "An EPYC", "python": "3.11", "libraries": {"torch": "2.15"}},
    }


def test_every_figure_stands_beside_the_dense_one(
    recipe: dict[str, Any], export: dict[str, Any]
) -> None:
    card = model_card(recipe, export)
    for line in (
        "| accuracy (top-1), test split (1,000 images) | 0.9000 (95 % interval 0.8799 to 0.9171, "
        "Wilson) | 0.9400 (95 % interval 0.9235 to 0.9531, Wilson) |",
        "| latency, ms | 0.500 (p10 0.400, p90 not measured), 2.00 times as fast | 1.000 |",
        "| latency on edge, ms | 3.250 | 8.500 |",
        "| multiply-adds of one image | 1,000 | 2,000 |",
        "| parameters | 10 | 20 |",
        "| conv1 | 16 | 9 |",
        "| model.onnx | 4 | onnxruntime 1.31, opset 18 | 2.0e-06 of 8 | 0.250 | 0.510 |",
    ):
        assert line in card.splitlines(), line
    for text in (
        "eager torch 2.15 on An EPYC, batch size 1, 2 thread(s), 200 runs",
        "Blocks: 1 (layer1.1).",
        "7 of 48 in 2 groups of coupled layers; scored by `fgp`, chosen by the rule `cumulative` "
        "with k = 0.7",
        "fine-tuned for 0.5 epochs, learning rate 0.01",
        "100 to train, 20 to validate, 1,000 to test (drawn from the data set)",
        "Unknown: that of the dense model's weights",
        "minus [0.5000], divided by [0.2500]",
    ):
        assert text in card, text
    assert "layer2.0" not in card  # it lost nothing


def test_what_was_not_measured_or_removed_is_not_made_up(
    recipe: dict[str, Any], export: dict[str, Any]
) -> None:
    recipe["trial"] |= {
        "latency_ms": None, "epochs": 0.0, "candidate": {"criterion": None, "select": None},
    }  # fmt: skip
    recipe["baseline"] |= {"latency_by_probe": {}, "latency_ms": None}
    recipe |= {"dropped_blocks": [], "channels": {}, "recover": {"recalibrate_bn": False}}
    del recipe["dense_test"], recipe["test"]["interval_95"]
    card = model_card(recipe | {"metric": "mIoU", "licence": "MIT"}, export)
    assert "\n| latency" not in card and "Latency: " not in card and "interval" not in card
    assert "| mIoU, test split (1,000 images) | 0.9000 | not evaluated |" in card
    assert "Blocks: none." in card and "Channels: none; no criterion was needed." in card
    assert "Afterwards: nothing." in card and "weights: MIT." in card


def test_names_of_others_are_plain_text(recipe: dict[str, Any], export: dict[str, Any]) -> None:
    recipe["model"]["name"] = "evil:<img src=x>"
    recipe |= {"dropped_blocks": ["a|b\n# c"], "licence": "[x](http://y) `z`"}
    export["asked"] = ["safetensors"]
    card = model_card(recipe, export)
    assert "<img" not in card.replace("\\<", "") and "\n# c" not in card
    assert "a\\|b \\# c" in card and "\\[x\\](http" in card
    assert "model = load(run_code=True)" in card
