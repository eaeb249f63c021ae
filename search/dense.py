"""The dense model of a search: its weights, trained at most once, and its metrics."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from ..methods.finetune import finetune
from ..methods.measure import count_macs, count_params, peak_memory_mib
from ..methods.shapes import copy_state, load_state
from ..methods.surgery import layer_widths
from .cache import Made, Say, open_cache, sharing_here
from .config import DEFAULT_PROBE, ConfigError
from .metrics import further
from .setup import Problem
from .store import atomic_write_bytes, read_as, write_json

DENSE_WEIGHTS = "weights/dense.safetensors"
BASELINE = "baseline.json"


@dataclass(frozen=True)
class Baseline:
    """The dense model's metrics; `accuracy` and `loss` are on the validation split.

    Attributes:
        source: `trained`, `cache` or the checkpoint's path.
        train_s: Seconds of training (0 when loaded).
        latency_ms: Reference latency, measured once a run; None until the probe has done so.
        probe: The probe's hardware, driver and library versions.
        latency_by_probe: The same two of each named probe.
        metrics: The task's further figures.
        widths: Output channels of every convolution and linear layer, in module order.
    """

    accuracy: float
    loss: float
    macs: int
    num_params: int
    peak_memory_mib: float
    source: str
    epochs: float
    train_s: float
    latency_ms: float | None = None
    probe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    latency_by_probe: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    widths: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def references(self) -> dict[str, float]:
        """Reference latency in ms by probe, of those that have measured it."""
        named = {name: found["latency_ms"] for name, found in self.latency_by_probe.items()}
        return named if self.latency_ms is None else {DEFAULT_PROBE: self.latency_ms, **named}

    def probe_of(self, name: str) -> Mapping[str, Any]:
        """Hardware, driver and library versions of a probe that has measured."""
        if name == DEFAULT_PROBE:
            return self.probe
        found: Mapping[str, Any] = self.latency_by_probe[name]["probe"]
        return found

    def write(self, run_dir: Path) -> None:
        """Stores `baseline.json`."""
        write_json(run_dir / BASELINE, {**dataclasses.asdict(self), "split": "val"})

    @classmethod
    def read(cls, run_dir: Path) -> Baseline:
        """Reads `baseline.json`, also one without what later versions added."""
        return read_as(run_dir / BASELINE, cls)


def prepare_dense(problem: Problem, run_dir: Path, say: Say) -> Baseline:
    """Brings the dense weights into the model and the run folder, and measures the baseline.

    Weights come from the run folder (resume), the checkpoint, the cache, or training.
    """
    config, model, task = problem.config, problem.model, problem.task
    stored = run_dir / DENSE_WEIGHTS
    if stored.exists() and (run_dir / BASELINE).exists():
        load_dense(model, stored)
        return Baseline.read(run_dir)
    source, seconds = _dense_weights(problem, say)
    model.eval()
    atomic_write_bytes(stored, save(copy_state(model)))
    metrics = task.evaluate(model, "val")
    example = task.example_input(config.latency.batch_size)
    baseline = Baseline(
        accuracy=metrics["accuracy"],
        loss=metrics["loss"],
        macs=count_macs(model, example),
        num_params=count_params(model),
        peak_memory_mib=peak_memory_mib(model, example),
        source=source,
        epochs=0 if config.model.checkpoint else config.baseline.epochs,
        train_s=seconds,
        metrics=further(metrics),
        widths=layer_widths(model),
    )
    baseline.write(run_dir)
    say(f"dense model: accuracy {baseline.accuracy:.4f} on val, {source}")
    return baseline


def with_references(
    baseline: Baseline,
    measured: Mapping[str, tuple[float, Mapping[str, Any]]],
    run_dir: Path,
    say: Say,
) -> Baseline:
    """The baseline with its latencies: measured once a run, kept when it is resumed.

    Args:
        baseline: The dense model's other metrics, and the latencies that are known.
        measured: Latency in ms and fingerprint, by probe.
        run_dir: The run folder.
        say: Told what is new, and whether a probe is another one now.
    """
    new = {name: found for name, found in measured.items() if name not in baseline.references}
    for name, (latency_ms, probe) in new.items():
        if name == DEFAULT_PROBE:
            baseline = dataclasses.replace(baseline, latency_ms=latency_ms, probe=probe)
        else:
            known = {**baseline.latency_by_probe, name: {"latency_ms": latency_ms, "probe": probe}}
            baseline = dataclasses.replace(baseline, latency_by_probe=known)
        where = f"{probe.get('gpu', probe['cpu'])}{f' (probe {name})' if name else ''}"
        say(f"dense latency {latency_ms:.3f} ms on {where}")
    if new:
        baseline.write(run_dir)
    for name, (_, probe) in measured.items():
        before = baseline.probe_of(name)
        changed = [k for k in ("cpu", "gpu", "torch") if before.get(k) != probe.get(k)]
        if changed:
            say(
                f"warning: latencies{f' of probe {name}' if name else ''} are now measured on "
                "another "
                + " and ".join(f"{k} ({probe.get(k)}, was {before.get(k)})" for k in changed)
                + ": speedups of the two sessions may differ"
            )
    return baseline


# --- its weights -----------------------------------------------------------------------------


def load_dense(model: nn.Module, path: Path) -> None:
    """Reads the run's dense weights into the model.

    Raises:
        ConfigError: If they are damaged or of another model.
    """
    try:
        load_state(model, load_file(path))
    except Exception as error:  # of a damaged file the library raises several kinds
        raise ConfigError(
            f"`{path}` must hold the dense weights: {error}. Restore it from a copy, or "
            "delete it: the same model is made again."
        ) from error


def _dense_weights(problem: Problem, say: Say) -> tuple[str, float]:
    """Where the weights that the model now holds came from, and the seconds of training."""
    config = problem.config
    if config.model.checkpoint:
        if not problem.task.data.official_test:
            say(
                f"warning: {config.data.name} has no test split of its own: val and test "
                "(data.split, data.seed) must hold no image that the checkpoint was trained on"
            )
        return config.model.checkpoint, 0.0
    cache = open_cache(config.cache, None, say, kind="dense")
    seconds: list[float] = []

    def train() -> Made:
        start = time.perf_counter()
        _train(problem, say)
        seconds.append(time.perf_counter() - start)
        return Made({name: tensor.cpu() for name, tensor in copy_state(problem.model).items()})

    made, _ = sharing_here(cache)(dense_key(problem), train)
    if seconds:
        return "trained", seconds[0]
    load_state(problem.model, made.tensors)
    return "cache", 0.0


def _train(problem: Problem, say: Say) -> None:
    config, baseline = problem.config, problem.config.baseline
    start = time.perf_counter()
    slow = config.resources.gpu > 0 and problem.task.device.type == "cpu"
    where = ", on the CPU: torch sees no GPU on this machine" if slow else ""
    say(f"training {config.model.name} on {config.data.name}: {baseline.epochs} epochs{where}")

    def on_epoch(epoch: int, loss: float) -> None:
        if epoch == baseline.epochs or epoch % max(1, baseline.epochs // 5) == 0:
            spent = time.perf_counter() - start
            left = spent / epoch * (baseline.epochs - epoch)
            say(f"  epoch {epoch}/{baseline.epochs}: loss {loss:.4f}, about {left:.0f} s left")

    try:
        finetune(
            problem.model,
            problem.task,
            epochs=baseline.epochs,
            lr=baseline.lr,
            momentum=baseline.momentum,
            weight_decay=baseline.weight_decay,
            generator=torch.Generator().manual_seed(config.search.seed),
            augment=config.data.augment,
            on_epoch=on_epoch,
        )
    except FloatingPointError as error:
        raise ConfigError(
            f"`baseline.lr` (={baseline.lr}) must let the dense model train: {error}. Lower it."
        ) from error


def dense_key(problem: Problem) -> dict[str, Any]:
    """All that the weights of a trained dense model depend on.

    Args:
        problem: Holds the model with its initial weights.
    """
    config = problem.config
    return problem.key("dense") | {
        "batches": config.data.model_dump(mode="json", include={"batch_size", "augment"}),
        "training": config.baseline.model_dump(mode="json"),
    }
