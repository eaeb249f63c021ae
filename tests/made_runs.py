"""Run folders with chosen rows, made without a search: real files, real models, no training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prunesearch.methods.measure import count_macs, count_params
from prunesearch.methods.shapes import copy_state
from prunesearch.methods.surgery import Recipe, prune
from prunesearch.search import Run
from prunesearch.search.config import dump_config, parse_config
from prunesearch.search.records import Candidate, TrialResult, TrialStatus
from prunesearch.search.setup import pose
from prunesearch.search.store import Store, atomic_write_bytes, write_json

CONFIG: dict[str, Any] = {
    "name": "made",
    "model": {"name": "resnet20"},
    "data": {"name": "digits", "image_size": 8, "batch_size": 64, "limit": 200},
    "space": {"criteria": ["magnitude_l1"]},
    "objectives": {"accuracy": "maximize", "latency_ms": "minimize"},
    "search": {"trials": 6},
    "latency": {"runs": 20},
}
DENSE = {
    "accuracy": 0.95, "loss": 0.2, "macs": 1_000_000, "num_params": 10_000,
    "peak_memory_mib": 1.0, "latency_ms": 4.0, "source": "trained", "epochs": 3, "train_s": 1.0,
    "probe": {
        "cpu": "A CPU", "torch": "2.15", "batch_size": 1, "threads": 1, "runs": 20, "host": "h",
    },
}  # fmt: skip


class Branchy(nn.Module):
    """Takes another way for another sign: no exporter can trace that."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


def row(name: str, accuracy: float, latency_ms: float, **changes: Any) -> TrialResult:
    """A completed trial of resnet20 with these figures."""
    made = TrialResult(
        name,
        TrialStatus.COMPLETED,
        criterion="magnitude_l1",
        candidate=Candidate("magnitude_l1", select="ratio").to_json(),
        accuracy=accuracy,
        accuracy_drop=DENSE["accuracy"] - accuracy,
        accuracy_by_fidelity=[accuracy],
        latency_ms=latency_ms,
        latency_ms_p10=latency_ms * 0.9,
        latency_ms_p90=latency_ms * 1.1,
        speedup=DENSE["latency_ms"] / latency_ms,
        macs=int(250_000 * latency_ms),
        num_params=int(2_500 * latency_ms),
        peak_memory_mib=latency_ms / 4,
        epochs=0.5,
        started_at=1e9,
        finished_at=1e9 + 1,
    )
    return dataclasses.replace(made, **changes)


ROWS = (
    row("t00000", 0.950, 4.0),
    row("t00001", 0.945, 2.5),
    row("t00002", 0.930, 1.5),  # the knee
    row("t00003", 0.500, 1.2),
    row("t00004", 0.900, 2.0),  # dominated by t00002
    row("t00005", 0.99, 0.1, status=TrialStatus.FAILED, message="loss\x1b is NaN"),
)


def rows_run(
    folder: Path, rows: Sequence[TrialResult] = ROWS, *overrides: str, **dense: Any
) -> Run:
    """A run folder that holds these rows and no weights."""
    config = parse_config(CONFIG, overrides)
    atomic_write_bytes(folder / "config.yaml", dump_config(config).encode())
    write_json(folder / "baseline.json", DENSE | dense)
    for one in rows:
        Store(folder).write_trial(one)
    return Run(folder)


def weights_run(folder: Path, *overrides: str, blocks: Sequence[str] = ()) -> Run:
    """A run folder with one member `t00000` that lost half its channels and these blocks."""
    config = parse_config(CONFIG, overrides)
    torch.manual_seed(0)
    problem = pose(config, prunable=False)  # also what nothing can be taken from
    groups = problem.plan.alive(blocks)
    kept = {group.name: tuple(range(0, group.num_channels, 2)) for group in groups}
    recipe = Recipe(tuple(sorted(blocks)), kept)
    model = prune(problem.model, problem.plan, recipe).eval()
    example = problem.task.example_input(2)
    member = row(
        "t00000",
        problem.task.evaluate(model, "val")["accuracy"],
        2.0,
        macs=count_macs(model, example),
        num_params=count_params(model),
        dropped_blocks=sorted(blocks),
        recipe="recipes/t00000.json",
        weights="weights/t00000.safetensors",
    )
    run = rows_run(folder, [member], *overrides, macs=count_macs(problem.model, example))
    atomic_write_bytes(folder / "recipes" / "t00000.json", recipe.to_json().encode())
    (folder / "weights").mkdir()
    save_file(copy_state(model), folder / "weights" / "t00000.safetensors")
    save_file(copy_state(problem.model), folder / "weights" / "dense.safetensors")
    return run
