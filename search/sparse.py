"""The sparse trainings of a run: what each reached, and how its batch-norm scales moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field
from rich.table import Table

from .cache import SHARED
from .plot import BLUE, GREY, INK, VERMILLION, new_figure, save_figure, tidy
from .shelf import ENTRY
from .store import read_as, read_json
from .yaml_source import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PHASES = {
    "decoupling": "phase 1: decouple",
    "finetuning": "phase 2: freeze",
    "slimming": "slimming",
}


@dataclass
class _Epoch:
    epoch: int
    phase: Literal["decoupling", "finetuning", "slimming"]
    loss: float
    seconds: float
    near_zero: float
    important: list[int]
    redundant: list[int]


@dataclass
class _History:
    bin_edges: Annotated[list[float], Field(min_length=2)]
    epochs: Annotated[list[_Epoch], Field(min_length=1)]


@dataclass
class _Info:
    dsd_lambda: float
    dsd_q: float
    dsd_epochs: float
    accuracy: float
    history: _History


@dataclass
class _Entry:
    info: _Info


def sparse_trainings(run_dir: Path) -> list[dict[str, Any]]:
    """What is stored of each sparse training of a run, by lambda, Q and epochs.

    Args:
        run_dir: The run folder.

    Raises:
        ConfigError: If there is none.
    """
    entries = sorted((run_dir / SHARED).glob(f"sparse-*/{ENTRY}"))
    found = [_info(path) for path in entries]
    if not found:
        raise ConfigError(
            f"`{run_dir}` must hold a sparse training: it has none. Name `dsd` in space.criteria."
        )
    return sorted(found, key=lambda made: (made["dsd_lambda"], made["dsd_q"], made["dsd_epochs"]))


def _info(path: Path) -> dict[str, Any]:
    """What an entry tells, checked."""
    history = read_as(path, _Entry).info.history
    counts = [bins for record in history.epochs for bins in (record.important, record.redundant)]
    if any(len(bins) != len(history.bin_edges) - 1 for bins in counts):
        raise ConfigError(f"`{path}` must count as many bins as it has. Delete its folder.")
    return dict(read_json(path)["info"])


def sparse_table(trainings: Sequence[dict[str, Any]]) -> Table:
    """One line a sparse training."""
    table = Table(title="Sparse trainings (accuracy on the validation split, before pruning)")
    for column in ("lambda", "Q", "epochs", "accuracy", "loss", "scales below 0.01", "seconds"):
        table.add_column(column, justify="right")
    for made in trainings:
        last = made["history"]["epochs"][-1]
        table.add_row(
            f"{made['dsd_lambda']:.2g}",
            f"{made['dsd_q']:g}",
            f"{made['dsd_epochs']:g}",
            f"{made['accuracy']:.4f}",
            f"{last['loss']:.4f}",
            f"{last['near_zero']:.1%}",
            f"{sum(record['seconds'] for record in made['history']['epochs']):.1f}",
        )
    return table


def plot_sparse(trainings: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draws the histograms of |tau|: over the epochs, and after the last one.

    Args:
        trainings: From `sparse_trainings`; one row of the picture each.
        path: Where to; the ending says the format: png, svg or pdf.
    """
    figure = new_figure(9.6, 0.5 + 2.6 * len(trainings))
    grid = figure.subplots(len(trainings), 2, squeeze=False)
    for (left, right), made in zip(grid, trainings, strict=True):
        _draw_epochs(left, made)
        _draw_last(right, made)
    return save_figure(figure, path)


def _draw_epochs(axes: Axes, made: dict[str, Any]) -> None:
    records, edges = made["history"]["epochs"], made["history"]["bin_edges"]
    counts = np.array([np.add(r["important"], r["redundant"]) for r in records], dtype=float).T
    rows = np.arange(len(records) + 1) + 0.5
    image = axes.pcolormesh(rows, edges, np.log10(counts + 1), cmap="Blues", rasterized=True)
    axes.figure.colorbar(image, ax=axes, label="log10(channels + 1)")
    for before, after in zip(records, records[1:], strict=False):
        if before["phase"] != after["phase"]:
            axes.axvline(before["epoch"] + 0.5, color=VERMILLION, lw=1.4, ls="--")
            axes.text(
                before["epoch"] + 0.5, edges[-1], " " + PHASES[after["phase"]],
                color=VERMILLION, fontsize=8.5, va="top",
            )  # fmt: skip
    title = f"λ = {made['dsd_lambda']:.2g}, Q = {made['dsd_q']:g}"
    axes.set_title(f"{title}, accuracy {made['accuracy']:.4f}", loc="left", fontsize=10.5)
    axes.set_xlabel("epoch of sparse training", color=INK)
    axes.set_ylabel("|τ|", color=INK)


def _draw_last(axes: Axes, made: dict[str, Any]) -> None:
    last, edges = made["history"]["epochs"][-1], np.array(made["history"]["bin_edges"])
    bottom = np.zeros(len(edges) - 1)
    for label, name, color in (("redundant", "redundant", GREY), ("important", "important", BLUE)):
        heights = np.array(last[name], dtype=float)
        axes.bar(
            edges[:-1], heights, np.diff(edges), bottom=bottom, align="edge", color=color,
            label=f"{label} ({int(heights.sum())} channels)",
        )  # fmt: skip
        bottom += heights
    axes.set_yscale("symlog", linthresh=1)
    axes.set_title("after the last epoch", loc="left", fontsize=10.5)
    axes.set_xlabel("|τ|", color=INK)
    axes.set_ylabel("channels", color=INK)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    tidy(axes)
