"""`prune-search bench slots`: trials an hour with several trials at a time on one device."""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ..config import ConfigError, SearchConfig
from ..environment import environment
from ..progress import Progress
from ..records import TrialResult, TrialStatus
from ..runs import run

EVERY_S = 1.0
NVIDIA_SMI = (
    "nvidia-smi", "--id=0", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits",
)  # fmt: skip


def bench_slots(
    config: SearchConfig, progress: Progress, *, slots: Sequence[int], seconds: float
) -> dict[str, Any]:
    """Runs random trials to the end for a while, with each number of slots in turn.

    On a GPU (`resources.gpu` above 0) a trial gets 1 / slots of one card, and latency is measured
    on a CPU, so that the card is the trials' alone; on CPUs a trial gets `resources.cpu` cores.

    Args:
        config: Model, data, space and recovery.
        progress: Where to report.
        slots: How many trials at a time.
        seconds: For each number, the start of the workers included (10 s or more). Counted is
            what ends after a first trial of each worker.

    Returns:
        A row for each number of slots, and the hardware.

    Raises:
        ConfigError: If so many CPU cores are not there. What fails on a card is in its row.
    """
    gpu = config.resources.gpu > 0
    variants = {count: _variant(config, count, seconds) for count in slots}
    rows = []
    for count, variant in variants.items():
        progress.say(f"== {count} trial(s) at a time, {seconds:g} s")
        with tempfile.TemporaryDirectory() as folder, _Watch(gpu) as watch:
            results = run(variant, out=Path(folder) / "run", progress=progress).results()
        rows.append(_row(count, results, watch))
    return {
        "model": config.model.name,
        "data": config.data.name,
        "device": "cuda" if gpu else "cpu",
        "seconds": seconds,
        "epochs": config.recover.epochs,
        "rows": rows,
        "environment": environment(),
    }


def slots_table(result: Mapping[str, Any]) -> Table:
    """`bench_slots` for people."""
    environment = result["environment"]
    table = Table(
        title=f"Trials at a time: {result['model']} on {result['data']}, "
        f"{result['epochs']:g} epochs a trial, "
        + (environment["gpu"] if result["device"] == "cuda" else environment["cpu"]),
        caption=f"{result['seconds']:g} s each; busy: the device's own word, median over the "
        "trials' time.",
    )
    for column in (
        "trials at a time", "trials", "failed", "trials an hour", "times the first", "busy",
    ):  # fmt: skip
        table.add_column(column)
    first = result["rows"][0]["per_hour"]
    for row in result["rows"]:
        rate, busy = row["per_hour"], row["busy"]
        table.add_row(
            str(row["slots"]),
            str(row["trials"]),
            str(row["failed"]),
            "too few" if rate is None else f"{rate:.0f}",
            "" if rate is None or first is None else f"{rate / first:.2f}",
            "unknown" if busy is None else f"{busy:.0%}",
        )
    return table


def _variant(config: SearchConfig, count: int, seconds: float) -> SearchConfig:
    """The config with so many slots, and nothing that favours one number over another."""
    data = config.model_dump(mode="json")
    resources = data["resources"] | {"max_concurrent": count}
    cores = len(os.sched_getaffinity(0))
    if config.resources.gpu > 0:
        resources |= {"gpu": 1 / count, "cpu": min(config.resources.cpu, cores / count)}
        data["latency"]["device"] = "cpu"
    elif count * config.resources.cpu > cores:
        raise ConfigError(
            f"`--slots` (={count}) must fit: {count} trials of {config.resources.cpu:g} cores are "
            f"more than the {cores} of this machine. Name fewer, or lower resources.cpu."
        )
    search = data["search"] | {
        "sampler": "random",
        "seeds": False,
        "sensitivity": False,
        "early_stop": False,
        "trials": 99_999,
        "time_limit_s": seconds,
        "plateau_trials": None,
    }
    changed = {"resources": resources, "search": search, "cache": {"reuse": "dense"}}
    return SearchConfig.model_validate(data | changed)


def _row(count: int, results: Sequence[TrialResult], watch: _Watch) -> dict[str, Any]:
    """Counts the trials that ended after each worker's first one, until the time was over."""
    ended = [r for r in results if r.status in (TrialStatus.COMPLETED, TrialStatus.INFEASIBLE)]
    ends = sorted(r.finished_at for r in ended if r.finished_at is not None)
    over = max((r.started_at or 0.0 for r in ended), default=0.0)  # none starts later
    counted = [end for end in ends[count:] if end <= over]
    row: dict[str, Any] = {"slots": count, "trials": len(counted), "per_hour": None, "busy": None}
    row["failed"] = sum(r.status is TrialStatus.FAILED for r in results)
    if counted:
        first = ends[count - 1]
        row["per_hour"] = len(counted) / (max(counted) - first) * 3600
        row["busy"] = watch.busy(first, over)
    return row


class _Watch:
    """Asks the device, once a second, how busy it is; a GPU through nvidia-smi where it is."""

    def __init__(self, gpu: bool) -> None:
        self._gpu = gpu
        self._seen: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def busy(self, begin: float, end: float) -> float | None:
        """Median share between two moments (of `time.time`); None where nothing is known."""
        seen = [share for moment, share in self._seen if begin <= moment <= end]
        return statistics.median(seen) if seen else None

    def _look(self) -> None:
        before = _cpu_ticks()
        while not self._over.wait(EVERY_S):
            now = _cpu_ticks()
            share = (now[0] - before[0]) / max(1, now[1] - before[1])
            before = now
            if self._gpu:
                try:
                    answer = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, check=True)
                    share = float(answer.stdout) / 100
                except (OSError, subprocess.SubprocessError, ValueError):
                    return  # it is not there: nothing is known
            self._seen.append((time.time(), share))


def _cpu_ticks() -> tuple[int, int]:
    """Busy ticks of all cores since the start of the machine, and all ticks."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)
