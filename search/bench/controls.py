"""`prune-search bench controls`: a search beside uniform and random pruning at the same budget.

Each control is a run of its own with the same model, data, dense weights, number of trials and
recovery. They are compared by speedup (a paired ratio), so that the runs need not share a moment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import ConfigError, SearchConfig
from ..front import front_of, hypervolume
from ..plot import plot_runs
from ..progress import Progress
from ..records import TrialResult, TrialStatus
from ..runs import CONFIG, Run, absolute, resume, run
from ..store import atomic_write_bytes
from .common import markdown_row

SPEEDUPS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
SLOWEST = 1.1  # reference point: accuracy 0 at 1.1 x the dense latency
LABELS = {
    "search": "search",
    "uniform": "uniform pruning (magnitude L1, one fraction for all layers)",
    "random": "random pruning (random channels, blocks and widths)",
}


def bench_controls(config: SearchConfig, out: Path, progress: Progress) -> dict[str, Run]:
    """Runs (or finishes, or only reads) the search and its controls, and writes what came out.

    Args:
        config: The search.
        out: Folder of the runs, one a variant; OUT.md and OUT.png are written beside it.
        progress: Where to report.

    Returns:
        The runs by variant: the search, `uniform` and `random`.
    """
    runs = {}
    for name, variant in variants(config).items():
        folder = out / name
        if (folder / CONFIG).exists() and not _is_of(Run(folder).config, absolute(variant)):
            raise ConfigError(
                f"`--out` (={out}) must hold runs of this config: {folder} is of another one. "
                "Choose another --out."
            )
        if not (folder / CONFIG).exists():
            progress.say(f"== {LABELS[name]}")
            run(variant, out=folder, progress=progress)
        elif not Run(folder).finished:
            progress.say(f"== {LABELS[name]}, resumed")
            resume(folder, progress=progress)
        runs[name] = Run(folder)
    atomic_write_bytes(out.parent / f"{out.name}.md", report(runs).encode())
    fronts = {LABELS[name]: _front(one) for name, one in runs.items()}
    plot_runs(fronts, out.parent / f"{out.name}.png", title=config.name)
    return runs


def variants(config: SearchConfig) -> dict[str, SearchConfig]:
    """The search, and its two controls at the same number of trials and the same recovery."""
    data = config.model_dump(mode="json")
    data["cache"]["reuse"] = "dense"  # else the later runs would find what the first one made
    space = data["space"]
    uniform = space | {
        "criteria": ["magnitude_l1"],
        "select": ["ratio"],
        "blocks": space["blocks"] | {"mode": "none"},
        "keep": space["keep"] | {"per": "model"},
    }
    chance = space | {"criteria": ["random"], "select": ["ratio"]}
    blind = data["search"] | {"sampler": "random", "seeds": False}
    return {
        "search": SearchConfig.model_validate(data),
        "uniform": SearchConfig.model_validate(data | {"space": uniform}),
        "random": SearchConfig.model_validate(data | {"space": chance, "search": blind}),
    }


def _is_of(stored: SearchConfig, config: SearchConfig) -> bool:
    """Whether a run has this config; `auto` is decided in the stored one."""
    if config.search.early_stop == "auto":
        search = config.search.model_copy(update={"early_stop": stored.search.early_stop})
        config = config.model_copy(update={"search": search})
    return stored == config


def report(runs: Mapping[str, Run]) -> str:
    """The comparison and the search's front as Markdown, with hardware and versions."""
    search = runs["search"]
    baseline, config = search.baseline, search.config
    environment = search.environment
    lines = [
        f"# {config.name}: search, uniform and random pruning at the same budget",
        "",
        f"{config.model.name} on {config.data.name}{_pixels(config)}, "
        f"{config.search.trials} trials each, {config.recover.epochs:g} epoch of fine-tuning a "
        f"trial, seed {config.search.seed}, one run each. All accuracies are on the validation "
        "split, which the search optimises. Latency: "
        f"{config.latency.device}, batch {config.latency.batch_size}, "
        f"{config.latency.threads} thread, paired with the dense model's.",
        "",
        f"Hardware: {environment['cpu']}, {environment['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in environment["libraries"].items())
        + ".",
        "",
        f"Dense: accuracy {baseline['accuracy']:.4f}, {baseline['latency_ms']:.3f} ms, "
        f"{baseline['macs'] / 1e6:.2f} M MACs, {baseline['num_params'] / 1e3:.1f} k parameters.",
        "",
        "## Best accuracy at a speedup of at least",
        "",
        markdown_row(["run", *(f"{s:g}x" for s in SPEEDUPS), "hypervolume", "trials", "seconds"]),
        markdown_row(["---"] * (len(SPEEDUPS) + 4)),
        *(_comparison(LABELS[name], one) for name, one in runs.items()),
        "",
        "Hypervolume of (accuracy, latency relative to dense) against (0, 1.1), over 1.1: 1 is "
        "unreachable. Seconds: wall clock of the trials.",
        "",
        "## Front of the search",
        "",
        markdown_row(
            [
                "trial",
                "accuracy",
                "drop",
                "speedup",
                "latency ms",
                "p10",
                "p90",
                "MACs M",
                "params k",
                "criterion",
                "rule",
                "dropped blocks",
            ]
        ),  # fmt: skip
        markdown_row(["---"] * 12),
        *(_member(result) for result in search.front_results()),
        "",
    ]
    return "\n".join(lines)


def _pixels(config: SearchConfig) -> str:
    return f" at {config.data.image_size} px" if config.data.image_size else ""


def figures(one: Run) -> dict[str, Any]:
    """A run in numbers: best accuracy by least speedup, hypervolume, trials, seconds.

    The hypervolume is of (accuracy, latency over dense) against (0, 1.1), over 1.1.
    """
    completed = _completed(one)
    best = {}
    for speedup in SPEEDUPS:
        fast = [r.accuracy or 0.0 for r in completed if (r.speedup or 0.0) >= speedup]
        best[f"{speedup:g}x"] = max(fast, default=None)
    points = [[r.accuracy or 0.0, 1 / (r.speedup or math.inf)] for r in completed]
    return {
        "best_accuracy": best,
        "hypervolume": hypervolume(points, (0.0, SLOWEST), [True, False]) / SLOWEST,
        "trials": len(one.results()),
        "trials_s": one.times.get("trials_s"),
    }


def _comparison(label: str, one: Run) -> str:
    found = figures(one)
    best = ["none" if a is None else f"{a:.4f}" for a in found["best_accuracy"].values()]
    seconds = found["trials_s"]
    return markdown_row(
        [
            label,
            *best,
            f"{found['hypervolume']:.4f}",
            str(found["trials"]),
            "" if seconds is None else f"{seconds:.0f}",
        ]
    )


def _member(r: TrialResult) -> str:
    numbers = [
        f"{r.accuracy:.4f}",
        f"{r.accuracy_drop:+.4f}",
        f"{r.speedup:.2f}",
        f"{r.latency_ms:.3f}",
        f"{r.latency_ms_p10:.3f}",
        f"{r.latency_ms_p90:.3f}",
        f"{(r.macs or 0) / 1e6:.2f}",
        f"{(r.num_params or 0) / 1e3:.1f}",
    ]
    rule = json.loads(r.candidate)["select"] or ""
    return markdown_row(
        [r.trial_id, *numbers, r.criterion or "", rule, ", ".join(r.dropped_blocks)]
    )


def _completed(one: Run) -> list[TrialResult]:
    return [r for r in one.results() if r.status == TrialStatus.COMPLETED and r.speedup]


def _front(one: Run) -> list[TrialResult]:
    return front_of(_completed(one), {"accuracy": "maximize", "speedup": "maximize"})
