"""The controls have the budget of the search, and the report says what came out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import SMALL, write_config

from prunesearch.search import load_config
from prunesearch.search.bench.controls import bench_controls, figures, report, variants
from prunesearch.search.config import dump_config
from prunesearch.search.progress import Progress
from prunesearch.search.records import TrialResult, TrialStatus
from prunesearch.search.store import Store, atomic_write_bytes, write_json


def test_controls_differ_only_in_what_they_search(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    found = variants(config)
    for variant in found.values():
        assert variant.model == config.model and variant.data == config.data
        assert variant.recover == config.recover and variant.latency == config.latency
        assert variant.search.trials == config.search.trials
    assert found["uniform"].space.blocks.mode == "none"
    assert found["uniform"].space.keep.per == "model"
    assert found["random"].space.criterion_names == ("random",)
    assert found["random"].search.sampler == "random" and not found["random"].search.seeds


def test_finished_runs_are_only_read(tmp_path: Path) -> None:
    """No Ray starts: the three runs are complete, and their numbers go into the table."""
    config = load_config(write_config(tmp_path, SMALL.replace("trials: 6", "trials: 2")))
    for index, (name, variant) in enumerate(variants(config).items()):
        folder = tmp_path / "out" / name
        atomic_write_bytes(folder / "config.yaml", dump_config(variant).encode())
        write_json(folder / "baseline.json", {
            "accuracy": 0.9, "latency_ms": 2.0, "macs": 1e6, "num_params": 1e3,
        })  # fmt: skip
        write_json(folder / "times.json", {"trials_s": 12.0})
        libraries = {"torch": "2"}
        write_json(folder / "environment.json", {"cpu": "C", "cores": 2, "libraries": libraries})
        for trial, (accuracy, speedup) in enumerate([(0.9, 1.0), (0.8 - index / 10, 2.0)]):
            Store(folder).write_trial(_row(trial, accuracy, speedup))
    runs = bench_controls(config, tmp_path / "out", Progress.silent())
    text = (tmp_path / "out.md").read_text()
    assert report(runs) == text
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    rows = {line.split("|")[1].split()[0]: line for line in text.splitlines() if "|" in line}
    # two boxes: 0.9 accuracy from 1.0 to 1.1 x dense latency, 0.8 from 0.5 to 1.0
    assert "| 0.9000 | 0.8000 | 0.8000 | 0.8000 | none | none |" in rows["search"]
    assert f"| {(0.9 * 0.1 + 0.8 * 0.5) / 1.1:.4f} | 2 | 12 |" in rows["search"]
    assert "| 0.9000 | 0.7000 |" in rows["uniform"]
    assert "| 0.9000 | 0.6000 |" in rows["random"]
    assert figures(runs["uniform"])["best_accuracy"] == pytest.approx({
        "1x": 0.9, "1.25x": 0.7, "1.5x": 0.7, "2x": 0.7, "2.5x": None, "3x": None,
    })  # fmt: skip


def _row(number: int, accuracy: float, speedup: float) -> TrialResult:
    return TrialResult(
        trial_id=f"t{number:05d}",
        status=TrialStatus.COMPLETED,
        candidate=json.dumps({"select": None, "origin": "tpe", "k": None, "keep": {}}),
        accuracy=accuracy,
        accuracy_drop=0.9 - accuracy,
        speedup=speedup,
        latency_ms=2.0 / speedup,
        latency_ms_p10=1.9 / speedup,
        latency_ms_p90=2.1 / speedup,
        macs=1_000_000,
        num_params=1000,
        finished_at=1.0,
        started_at=0.0,
    )
