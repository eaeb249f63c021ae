"""`prune-search bench engine`: what the engine costs a trial, and how busy it keeps the workers.

Real Tune, real Ray, real coordinator, sampler and ledger; only the trial itself is `NoOp`.
"""

from __future__ import annotations

import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..cluster import connect  # first: it sets Ray's environment

# isort: split
import ray
import torch
from ray import tune
from rich.table import Table

from ...methods.groups import plan_pruning
from ...methods.models.build import build_model
from ..config import SearchConfig, parse_config
from ..context import TrialSpec
from ..coordinator import COMPACT_EVERY, Coordinator
from ..deaths import cause_of_death
from ..dense import Baseline
from ..driver import run_trials
from ..environment import environment
from ..nodes import Room
from ..records import TrialResult
from ..space import Space
from .noop import NoOp

WINDOW = COMPACT_EVERY  # the last trials before each size are timed, one compaction among them
MOST = 99_999  # trials: the names have five digits
START_S = 480.0  # after so long the workers that are up are measured
BASELINE = Baseline(0.9, 0.3, 10**6, 10**5, 10.0, "invented", 1, 0.0, latency_ms=2.0)
BLOCKS = ("layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2")

Say = Callable[[str], None]


def bench_engine(
    *,
    sizes: Sequence[int] = (100, 1000, 5000),
    default_sizes: Sequence[int] = (100, 1000),
    pair_s: float = 20.0,
    slots: int | None = None,
    say: Say = lambda message: None,
) -> dict[str, Any]:
    """Measures the overhead of a trial, two workers against one, and a cluster's busy share.

    Args:
        sizes: Numbers of no-op trials, ascending: one run, looked at when it has so many.
        default_sizes: The same with the default sampler.
        pair_s: Seconds of half-second trials with one worker and with two.
        slots: Slots of a simulated cluster of nodes with 16 CPUs each; None for none.
        say: Told what is measured now.
    """
    result: dict[str, Any] = {"environment": environment(), "growth": [], "busy": []}

    def add(part: str, rows: list[dict[str, Any]]) -> None:
        result[part] += rows
        for row in rows:  # at once: the whole takes long
            say(f"  {json.dumps(row)}")

    for sampler, points in (("random", sizes), (default_sampler(), default_sizes)):
        if points:
            say(f"{points[-1]} no-op trials, sampler {sampler}")
            with connect(None):
                add("growth", growth(sampler, points))
    if pair_s:
        say("two workers against one")
        with connect(None):
            add("busy", [workers(count, pair_s) for count in (1, 2)])
    if slots is not None:
        say(f"a simulated cluster of {slots} slots")
        add("busy", [cluster(slots)])
    return result


def engine_tables(result: Mapping[str, Any]) -> list[Table]:
    """`bench_engine` for people."""
    cpu = result["environment"]["cpu"]
    growth = Table(title=f"No-op trials, one worker, {cpu}")
    for column in (
        "sampler", "trials", "ms a trial", "growth", "driver's CPU ms", "growth", "ours ms",
        "wait for a proposal ms (95 %)", "driver MiB",
    ):  # fmt: skip
        growth.add_column(column)
    for row in result["growth"]:
        growth.add_row(
            row["sampler"], str(row["trials"]), f"{row['ms']:.1f}", f"{row['growth']:.2f}",
            f"{row['cpu_ms']:.1f}", f"{row['cpu_growth']:.2f}", f"{row['own_ms']:.1f}",
            f"{row['ask_ms']:.1f} ({row['ask_ms_p95']:.1f})",
            f"{row['driver_mib']:.0f}",
        )  # fmt: skip
    busy = Table(title=f"Sleeping trials, {cpu}")
    for column in (
        "workers", "nodes", "trial s", "trials", "trials/s", "busy",
        "wait for a proposal ms (most)", "all up after s",
    ):  # fmt: skip
        busy.add_column(column)
    for row in result["busy"]:
        busy.add_row(
            str(row["workers"]), str(row["nodes"]), "{:g} to {:g}".format(*row["sleep_s"]),
            str(row["trials"]), f"{row['rate']:.2f}", f"{row['busy']:.1%}",
            f"{row['ask_ms']:.1f} ({row['ask_ms_max']:.0f})", f"{row['up_s']:.0f}",
        )  # fmt: skip
    return [table for table in (growth, busy) if table.row_count]


def growth(sampler: str, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The last trials before each size, in one run on one worker; duplicates do not count."""
    with engine(sampler) as coordinator:
        coordinator.look_at(sizes)
        _run(coordinator, 1, (0.0, 0.0))
        rows = [_window(coordinator, size) | {"sampler": sampler} for size in sizes]
    first = rows[0]
    return [
        row | {"growth": row["ms"] / first["ms"], "cpu_growth": row["cpu_ms"] / first["cpu_ms"]}
        for row in rows
    ]


def workers(slots: int, seconds: float, sleep_s: tuple[float, float] = (0.5, 0.5)) -> Any:
    """How busy `slots` workers are over so many seconds once all are up."""
    with engine(default_sampler(), slots=slots, seconds=seconds) as coordinator:
        start = time.time()
        _run(coordinator, slots, sleep_s)
        nodes = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
        return _busy(coordinator, start) | {"sleep_s": sleep_s, "nodes": nodes}


def cluster(slots: int, seconds: float = 90.0) -> Any:
    """Trials of 10 to 20 s on several raylets of this machine, 16 CPUs each by their word."""
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
    try:
        left = slots
        while left > 0:
            nodes.add_node(num_cpus=min(16, left), **memory)
            left -= 16
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        return workers(slots, seconds, (10.0, 20.0))
    finally:
        ray.shutdown()
        nodes.shutdown()


def default_sampler() -> str:
    """The sampler of a config that names none."""
    return str(SearchConfig.model_fields["search"].get_default(call_default_factory=True).sampler)


# --- the measured coordinator ----------------------------------------------------------------


class _Timed(Coordinator):
    """A coordinator that looks at the clock."""

    slots = 1
    seconds: float | None = None

    def __init__(self, *arguments: Any) -> None:
        self.ends: list[float] = []  # of each trial
        self.cpu_s: list[float] = []  # of this process until then, all its threads
        self.own_s: list[float] = []  # spent in here, a trial
        self.waits: list[float] = []  # from a trial's end to the next proposal
        self.mib: dict[int, float] = {}
        self._sizes: tuple[int, ...] = ()
        self._free: list[float] = []
        self._own = 0.0
        self._hosts: set[str] = set()
        self._stop_at: float | None = None
        self._late_at = time.time() + START_S
        super().__init__(*arguments)

    def look_at(self, sizes: Sequence[int]) -> None:
        """Notes the memory when so many trials have ended, and stops at the last."""
        self._sizes = tuple(sizes)

    @property
    def done(self) -> bool:
        """Also when the measured time is over, or the last size is reached."""
        over = self._stop_at is not None and time.time() > self._stop_at
        return over or self._sizes[-1:] == (len(self.ends),) or super().done

    def next(self, *, train: bool = True, evaluate: bool = True) -> TrialSpec | None:
        """Timed; nothing once it is over."""
        if self.done:
            return None
        start = time.perf_counter()
        spec = super().next(train=train, evaluate=evaluate)
        now = time.perf_counter()
        self._own += now - start
        if spec is not None and self._free:
            self.waits.append(now - self._free.pop(0))
        return spec

    def finish(self, result: TrialResult) -> None:
        """Timed."""
        start = time.perf_counter()
        super().finish(result)
        now = time.perf_counter()
        self._free.append(start)
        self.own_s.append(self._own + now - start)
        self._own = 0.0
        self.ends.append(now)
        self.cpu_s.append(time.process_time())
        if len(self.ends) in self._sizes:
            self.mib[len(self.ends)] = _memory_mib()
        self._hosts.add(result.host)
        up = len(self._hosts) >= self.slots or time.time() > self._late_at
        if self._stop_at is None and self.seconds and up:
            self._stop_at = time.time() + self.seconds


@contextmanager
def engine(sampler: str, slots: int = 1, seconds: float | None = None) -> Iterator[_Timed]:
    """A coordinator over a real space of ResNet-20 and a ledger in a folder of its own."""
    config = parse_config(
        {
            "model": {"name": "resnet20"},
            "data": {"name": "digits"},
            "space": {"criteria": ["magnitude_l1", "fgp"], "keep": {"per": "group"}},
            "search": {
                "sampler": sampler,
                "trials": MOST,
                "seeds": False,
                "early_stop": False,
            },
        }
    )
    plan = plan_pruning(build_model("resnet20", num_classes=10), torch.zeros(2, 3, 32, 32))
    space = Space(config.space, plan, tuple(BLOCKS[:n] for n in range(len(BLOCKS) + 1)))
    with tempfile.TemporaryDirectory(prefix="prune-search-") as folder:
        coordinator = _Timed(config, space, BASELINE, Path(folder), lambda result: None)
        coordinator.slots, coordinator.seconds = slots, seconds
        try:
            yield coordinator
        finally:
            coordinator.close()


def _run(coordinator: Coordinator, slots: int, sleep_s: tuple[float, float]) -> None:
    trainable = tune.with_parameters(NoOp, sleep_s=sleep_s)
    run_trials(
        coordinator,
        trainable,
        lambda: Room(slots, 0, slots),
        lambda running: None,
        lambda trial, error: cause_of_death(error, log=""),
    )


def _window(coordinator: _Timed, size: int) -> dict[str, Any]:
    first = size - min(WINDOW, size // 2)
    took = coordinator.ends[size - 1] - coordinator.ends[first - 1]
    cpu, waits = coordinator.cpu_s, coordinator.waits[first:size]
    return {
        "trials": size,
        "ms": 1e3 * took / (size - first),
        "cpu_ms": 1e3 * (cpu[size - 1] - cpu[first - 1]) / (size - first),
        "own_ms": 1e3 * statistics.fmean(coordinator.own_s[first:size]),
        "ask_ms": 1e3 * statistics.median(waits),
        "ask_ms_p95": 1e3 * sorted(waits)[int(0.95 * len(waits))],
        "driver_mib": coordinator.mib[size],
    }


def _busy(coordinator: _Timed, start: float) -> dict[str, Any]:
    """The share of the slots' time that trials took, from when all ran until none was asked."""
    rows = [r for r in coordinator.results.values() if r.started_at and r.finished_at and r.host]
    firsts: dict[str, float] = {}
    for row in rows:
        assert row.started_at is not None
        firsts[row.host] = min(firsts.get(row.host, row.started_at), row.started_at)
    up = max(firsts.values())
    over = max(row.started_at or 0.0 for row in rows)
    inside = [
        max(0.0, min(row.finished_at or 0.0, over) - max(row.started_at or 0.0, up))
        for row in rows
    ]
    ended = sum(up < (row.finished_at or 0.0) <= over for row in rows)
    return {
        "workers": len(firsts),
        "trials": ended,
        "rate": ended / (over - up),
        "busy": sum(inside) / (len(firsts) * (over - up)),
        "ask_ms": 1e3 * statistics.median(coordinator.waits),
        "ask_ms_max": 1e3 * max(coordinator.waits),
        "up_s": up - start,
        "driver_mib": _memory_mib(),
    }


def _memory_mib() -> float:
    """The most that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
