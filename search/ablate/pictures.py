"""Draws the studies that are figures in their paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..plot import INK, new_figure, save_figure, tidy
from ..records import TrialResult
from .cells import Cell, cells, series_of
from .study import TUNED, Picture, Row, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#222222",
    "#882255", "#999933",
)  # fmt: skip
_MARKERS = "os^DvPX*h"  # Okabe and Ito's palette and two of Tol's; markers differ too
_PANELS = {
    "accuracy_before_finetune": "validation accuracy before fine-tuning (%)",
    "accuracy": "validation accuracy, fine-tuned (%)",
    "gap": "validation accuracy lost, fine-tuned (points)",
}
DODGE = 0.05  # between curves that share their positions, as a part of their distance


def draw(
    study: Study,
    rows: Sequence[Row],
    results: Sequence[TrialResult],
    path: str | Path,
    *,
    seeds: int,
    title: str,
) -> Path:
    """Draws mean and range over the seeds of every curve, one panel a metric, as a PNG.

    Args:
        study: With a `picture`.
        rows: Its rows.
        results: The ledger.
        path: Where to.
        seeds: How many there are to be.
        title: Text above.
    """
    picture = study.picture
    assert picture is not None
    found = [cell for cell in cells(rows, results, seeds) if cell.results]
    metrics = ["gap"] if picture.gap else list(study.compare)
    figure = new_figure(7.6 if len(metrics) == 1 else 11.5, 5.0)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold", color=INK)
    for index, metric in enumerate(metrics):
        axes = figure.add_subplot(1, len(metrics), index + 1)
        axes.set_xlabel(picture.x_label, fontsize=10.5, color=INK)
        axes.set_ylabel(_PANELS[metric], fontsize=10.5, color=INK)
        tidy(axes)
        _panel(axes, picture, found, metric)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5
    )
    return save_figure(figure, Path(path))


def _panel(axes: Axes, picture: Picture, found: Sequence[Cell], metric: str) -> None:
    curves = _curves(found, metric)
    if picture.x == "bars":
        _bars(axes, [members[0] for members in curves.values()], metric)
        return
    if not picture.gap:
        _star(axes, picture, found, metric)
    for index, (label, members) in enumerate(curves.items()):
        shift = DODGE * (index - (len(curves) - 1) / 2) if picture.x == "point" else 0.0
        color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
        axes.errorbar(
            [_x(cell, picture.x) + shift for cell in members],
            [_mean(cell, metric) for cell in members],
            yerr=list(zip(*(_span(cell, metric) for cell in members), strict=True)),
            label=label, color=color, marker=marker, ms=6, mec="white", lw=1.6, capsize=2.5,
            elinewidth=1,
        )  # fmt: skip


def _bars(axes: Axes, members: Sequence[Cell], metric: str) -> None:
    spans = list(zip(*(_span(cell, metric) for cell in members), strict=True))
    for index, cell in enumerate(members):
        color = _COLORS[index % len(_COLORS)]
        axes.bar(index, _mean(cell, metric), color=color, width=0.7, label=cell.row.label)
    heights = [_mean(cell, metric) for cell in members]
    axes.errorbar(range(len(members)), heights, yerr=spans, fmt="none", color=INK, capsize=3)
    labels = [f"{_mean(cell, 'macs'):.1f} %" for cell in members]
    axes.set_xticks(range(len(members)), labels)


def _star(axes: Axes, picture: Picture, found: Sequence[Cell], metric: str) -> None:
    """The unpruned model; where fine-tuned accuracies are drawn it is fine-tuned alike."""
    tuned = metric == "accuracy"
    label = "unpruned, fine-tuned alike" if tuned else "unpruned (right: fine-tuned alike)"
    for cell in found:
        if cell.row.label == TUNED if tuned else cell.row.work == "dense":
            x = 100.0 if picture.x == "macs" else 0.0
            axes.scatter(
                x, _mean(cell, metric), marker="*", s=240, color=INK, edgecolors="white",
                label=label, zorder=7,
            )  # fmt: skip


def _curves(found: Sequence[Cell], metric: str) -> Mapping[str, list[Cell]]:
    curves: dict[str, list[Cell]] = {}
    for cell in found:
        pruned = cell.row.work != "dense" and cell.row.label != TUNED
        if pruned and cell.values(metric):
            curves.setdefault(series_of(cell), []).append(cell)
    return curves


def _x(cell: Cell, kind: str) -> float:
    if kind == "macs":
        return _mean(cell, "macs")
    assert cell.position is not None
    return cell.position


def _mean(cell: Cell, metric: str) -> float:
    values = list(cell.values(metric).values())
    return sum(values) / len(values)


def _span(cell: Cell, metric: str) -> tuple[float, float]:
    values = list(cell.values(metric).values())
    mean = sum(values) / len(values)
    return max(0.0, mean - min(values)), max(0.0, max(values) - mean)
