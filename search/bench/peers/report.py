"""What came out, as Markdown, Parquet and a picture."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...config import SearchConfig
from ...front import non_dominated
from ...plot import BLUE, GREEN, INK, ORANGE, VERMILLION, new_figure, save_figure, tidy
from ...store import atomic_write_bytes, read_json
from ..common import markdown_row
from .curves import COSTS, FRACTIONS, Point, curve, num_ahead, spread
from .latencies import measure_all, short_key
from .log import Entry, count_failures, read_log
from .problem import PeerProblem
from .registry import METHODS, OURS

SHOWN = (0.1, 0.25, 0.5, 0.75, 1.0)
NAMES = {"latency": "accuracy and latency", "macs": "accuracy and MACs"}
LOOKS = [
    (BLUE, "-"),
    (GREEN, "-"),
    (ORANGE, "-"),
    (VERMILLION, "-"),
]

Curves = dict[str, dict[str, list[list[float]]]]  # cost -> method -> one curve a seed


def write_report(
    out: Path, config: SearchConfig, *, seconds: float, seeds: int, methods: Sequence[str]
) -> dict[str, Any]:
    """Measures the latencies that are missing and writes OUT.md, OUT.parquet and OUT.png.

    Returns:
        The Markdown, and its numbers: hypervolume by cost, method and seed at `fractions` of the
        time, candidates and failures by method.
    """
    curves: Curves = {cost: {name: [] for name in methods} for cost in COSTS}
    rows: list[dict[str, Any]] = []
    dense: list[str] = []
    failures = dict.fromkeys(methods, 0)
    for seed in range(config.search.seed, config.search.seed + seeds):
        folder = out / f"seed{seed}"
        problem = PeerProblem(folder / "problem")
        baseline = problem.baseline
        logs = {name: read_log(folder / name, seconds) for name in methods}
        known = measure_all(problem, (e.architecture for log in logs.values() for e in log))
        for name, log in logs.items():
            points = [_point(entry, known, baseline) for entry in log]
            for cost in COSTS:
                curves[cost][name].append(curve(points, cost, seconds, baseline["accuracy"]))
            rows += _rows(seed, name, log, points, known)
            failures[name] += count_failures(folder / name)
            _keep_fronts(folder / name, log, points)
        dense.append(f"{baseline['accuracy']:.4f}")
    _write_parquet(rows, Path(f"{out}.parquet"))
    _draw(curves, seconds, Path(f"{out}.png"), config.name)
    text = _markdown(
        out,
        config,
        curves,
        rows,
        failures,
        seconds=seconds,
        methods=methods,
        dense=dense,
    )
    atomic_write_bytes(f"{out}.md", text.encode())
    return {
        "markdown": text,
        "seconds": seconds,
        "fractions": list(FRACTIONS),
        "hypervolume": curves,
        "candidates": Counter(row["method"] for row in rows),
        "failures": failures,
    }


def _point(entry: Entry, known: Mapping[str, Any], baseline: Mapping[str, Any]) -> Point:
    costs = {
        "latency": 1 / known[short_key(entry.architecture)]["speedup"],
        "macs": entry.macs / baseline["macs"],
    }
    return Point(entry.seconds, entry.accuracy, costs)


def _front(points: Sequence[Point], cost: str) -> list[bool]:
    values = [[p.accuracy, p.costs[cost]] for p in points]
    return [bool(x) for x in non_dominated(np.reshape(values, (-1, 2)), [True, False])]


def _rows(
    seed: int,
    name: str,
    log: Sequence[Entry],
    points: Sequence[Point],
    known: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The columns of OUT.parquet."""
    fronts = {f"on_front_{cost}": _front(points, cost) for cost in COSTS}
    rows = []
    for index, entry in enumerate(log):
        facts = {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry)}
        del facts["weights"]
        rows.append(
            {"seed": seed, "method": name}
            | facts
            | {"architecture": entry.architecture.key}
            | known[short_key(entry.architecture)]
            | {column: mask[index] for column, mask in fronts.items()}
        )
    return rows


def _keep_fronts(folder: Path, log: Sequence[Entry], points: Sequence[Point]) -> None:
    """Deletes the weights of what is on neither front at the end."""
    fronts = [_front(points, cost) for cost in COSTS]
    for entry, *on in zip(log, *fronts, strict=True):
        if entry.weights is not None and not any(on):
            (folder / entry.weights).unlink(missing_ok=True)


def _write_parquet(rows: Sequence[dict[str, Any]], path: Path) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink, compression="zstd")
    atomic_write_bytes(path, sink.getvalue())


# --- the text --------------------------------------------------------------------------------


def _markdown(
    out: Path,
    config: SearchConfig,
    curves: Curves,
    rows: Sequence[Mapping[str, Any]],
    failures: Mapping[str, int],
    *,
    seconds: float,
    methods: Sequence[str],
    dense: Sequence[str],
) -> str:
    environment = read_json(out / "protocol.json")["environment"]
    versions = [f"{k} {v}" for k, v in {**environment["libraries"], **_peer_versions()}.items()]
    workers = PeerProblem(out / f"seed{config.search.seed}" / "problem").workers
    lines = [
        f"# {config.name}: hypervolume against seconds, beside other tools",
        "",
        f"{config.model.name} on {config.data.name}"
        + (f" at {config.data.image_size} px" if config.data.image_size else "")
        + f", {config.recover.epochs:g} epoch of recovery a candidate, {seconds:g} s a method "
        f"and seed, {_count(len(dense), 'seed')}, {_count(workers, 'worker')} of "
        f"{_count(max(1, int(config.resources.cpu)), 'thread')} for all. Dense accuracy by seed: "
        f"{', '.join(dense)}. Latency: {config.latency.device}, batch "
        f"{config.latency.batch_size}, {_count(config.latency.threads, 'thread')}, one probe for "
        "all.",
        "",
        f"Hardware: {environment['cpu']}, {environment['cores']} cores; {', '.join(versions)}.",
        "",
    ]
    for cost in COSTS:
        table = _table(curves[cost], rows, failures)
        lines += [f"## Hypervolume of {NAMES[cost]}", "", *table, ""]
    if OURS in methods and len(methods) > 1:
        lines += ["## Time points at which this search is ahead", "", *_ahead(curves), ""]
    return "\n".join(lines)


def _table(
    by_method: Mapping[str, list[list[float]]],
    rows: Sequence[Any],
    failures: Mapping[str, int],
) -> list[str]:
    """Median and range over the seeds at some points of time."""
    heads = [f"{fraction:.0%} of the time" for fraction in SHOWN]
    lines = [
        markdown_row(["method", "candidates a seed", *heads]),
        markdown_row(["---"] * (len(SHOWN) + 2)),
    ]
    for name, curves in by_method.items():
        count = sum(row["method"] == name for row in rows) / len(curves)
        low, median, high = spread(curves)
        at = [_nearest(fraction) for fraction in SHOWN]
        cells = [f"{median[i]:.4f} ({low[i]:.4f} to {high[i]:.4f})" for i in at]
        failed = f" ({failures[name] / len(curves):.0f} failed)" if failures[name] else ""
        lines.append(markdown_row([METHODS[name].label, f"{count:.0f}{failed}", *cells]))
    return lines


def _ahead(curves: Curves) -> list[str]:
    """Of the points after the first tenth, seed by seed."""
    seeds = len(next(iter(curves["latency"].values())))
    head = ["against", "hypervolume of", *(f"seed {i + 1}" for i in range(seeds))]
    lines = [markdown_row(head), markdown_row(["---"] * len(head))]
    for name in curves["latency"]:
        if name == OURS:
            continue
        for cost in COSTS:
            pairs = zip(curves[cost][OURS], curves[cost][name], strict=True)
            cells = ["{} of {}".format(*num_ahead(ours, theirs)) for ours, theirs in pairs]
            lines.append(markdown_row([METHODS[name].label, NAMES[cost], *cells]))
    return lines


def _peer_versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in ("torch-pruning", "nvidia-modelopt", "syne-tune"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # its method was left out
    return found


def _nearest(fraction: float) -> int:
    return min(range(len(FRACTIONS)), key=lambda i: abs(FRACTIONS[i] - fraction))


# --- the picture -----------------------------------------------------------------------------


def _draw(curves: Curves, seconds: float, path: Path, title: str) -> None:
    figure = new_figure(11, 4.8)
    times = [fraction * seconds for fraction in FRACTIONS]
    for place, cost in enumerate(COSTS, start=1):
        axes = figure.add_subplot(1, len(COSTS), place)
        for name, (color, line) in zip(METHODS, LOOKS, strict=True):
            if name not in curves[cost]:
                continue
            low, median, high = spread(curves[cost][name])
            width = 2.6 if name == OURS else 1.4
            label = METHODS[name].label
            axes.plot(times, median, color=color, ls=line, lw=width, label=label)
            axes.fill_between(times, low, high, color=color, alpha=0.12, lw=0)
        axes.set_xlabel("wall-clock seconds", fontsize=10.5, color=INK)
        axes.set_ylabel(f"hypervolume of {NAMES[cost]}", fontsize=10.5, color=INK)
        tidy(axes)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold", color=INK)
    handles = figure.axes[0].get_legend_handles_labels()[0]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9.5
    )
    save_figure(figure, path)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
