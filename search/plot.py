"""The picture of a search: every trial, the front, the dense model and the controls."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..methods.names import nearest
from .front import front_of
from .metrics import dense_value, direction_of, metrics_of, split
from .records import TrialResult, TrialStatus, is_uniform, probes_of
from .store import atomic_write_bytes
from .yaml_source import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Style = dict[str, Any]

FORMATS = ("png", "svg", "pdf")

INK, GREY, LIGHT = "#222222", "#8a8a8a", "#e6e6e6"
BLUE, VERMILLION, ORANGE, GREEN = "#0072B2", "#D55E00", "#E69F00", "#009E73"
# Okabe and Ito's palette: distinct for colour-blind readers; markers differ too.


@dataclasses.dataclass(frozen=True)
class _Axis:
    label: str
    scale: float = 1.0


_AXES = {
    "accuracy": _Axis("validation accuracy (%)", 100),
    "accuracy_drop": _Axis("accuracy drop (percentage points)", 100),
    "loss": _Axis("validation loss (nats)"),
    "latency_ms": _Axis("latency (ms)"),
    "speedup": _Axis("speedup over dense (×)"),
    "macs": _Axis("multiply-adds an image (millions)", 1e-6),
    "num_params": _Axis("parameters (thousands)", 1e-3),
    "peak_memory_mib": _Axis("peak memory (MiB)"),
}


def plot_front(
    results: Sequence[TrialResult],
    baseline: Mapping[str, Any],
    path: str | Path,
    *,
    x: str = "latency_ms",
    y: str = "accuracy",
    title: str = "",
) -> Path:
    """Save the picture of `front_figure`; the path's ending says the format: png, svg or pdf.

    Raises:
        ConfigError: If a metric or the format is unknown.
    """
    return save_figure(front_figure(results, baseline, x=x, y=y, title=title), Path(path))


def front_figure(
    results: Sequence[TrialResult],
    baseline: Mapping[str, Any],
    *,
    x: str = "latency_ms",
    y: str = "accuracy",
    title: str = "",
) -> Figure:
    """Draw the trials in two metrics.

    Completed trials are dots, infeasible ones are hollow, the front in these two metrics is a
    staircase, the dense model a star. The controls have markers of their own: random channels
    (criterion `random`) and uniform pruning (an origin that begins with `seed: uniform`).

    Args:
        results: Trials in any state; those without the two metrics are left out.
        baseline: The dense model's metrics.
        x: Metric of the horizontal axis.
        y: Metric of the vertical axis.
        title: Text above the picture.

    Raises:
        ConfigError: If a metric is unknown.
    """
    known = metrics_of(sorted({*probes_of(results), *baseline.get("latency_by_probe", {})}))
    _check("x", x, known)
    _check("y", y, known)
    return _figure(x, y, title, lambda axes: _draw(axes, results, baseline, x, y), columns=3)


def plot_runs(
    fronts: Mapping[str, Sequence[TrialResult]], path: str | Path, *, title: str = ""
) -> Path:
    """Draw the fronts of several runs over each other: accuracy against speedup over dense.

    Args:
        fronts: Label -> front members, sorted along the front.
        path: Where to; the ending says the format: png, svg or pdf.
        title: Text above the picture.
    """
    looks = zip((BLUE, GREEN, ORANGE, VERMILLION), "os^D", strict=True)

    def draw(axes: Axes) -> None:
        for (label, members), (color, marker) in zip(fronts.items(), looks, strict=False):
            xs = [_scaled("speedup")(r) for r in members]
            ys = [_scaled("accuracy")(r) for r in members]
            style: Style = {"marker": marker, "ms": 6, "mec": "white", "lw": 1.6, "color": color}
            axes.plot(xs, ys, label=label, **style)
        axes.axvline(1.0, color=GREY, lw=1, ls=":", zorder=1)

    return save_figure(_figure("speedup", "accuracy", title, draw, columns=1), Path(path))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes the figure atomically; the path's ending says the format.

    Raises:
        ConfigError: If the format is unknown.
    """
    ending = path.suffix.lower().removeprefix(".")
    _check("plot", ending, FORMATS)
    picture = io.BytesIO()
    figure.savefig(picture, format=ending)
    atomic_write_bytes(path, picture.getvalue())
    return path


def tidy(axes: Axes) -> None:
    """The look that all pictures share."""
    axes.grid(color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9.5, length=0)


def _figure(x: str, y: str, title: str, draw: Callable[[Axes], None], *, columns: int) -> Figure:
    figure = new_figure(7.6, 5.0)
    axes = figure.add_subplot()
    _decorate(axes, x, y, title)
    draw(axes)
    handles = axes.get_legend_handles_labels()[0][:: -1 if columns > 1 else 1]
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=9.5,
        )
    return figure


def _draw(
    axes: Axes, results: Sequence[TrialResult], baseline: Mapping[str, Any], x: str, y: str
) -> None:
    shown = [r for r in results if r.metric(x) is not None and r.metric(y) is not None]
    completed = [r for r in shown if r.status is TrialStatus.COMPLETED]
    layers: list[tuple[str, list[TrialResult], Style]] = [
        (
            "infeasible trial",
            [r for r in shown if r.status is TrialStatus.INFEASIBLE],
            {"marker": "o", "s": 20, "facecolors": "none", "edgecolors": "#b5b5b5", "zorder": 2},
        ),
        (
            "trial",
            [r for r in completed if not _is_random(r) and not is_uniform(r)],
            {"marker": "o", "s": 20, "color": GREY, "linewidths": 0, "zorder": 3},
        ),
        (
            "control: random channels",
            [r for r in completed if _is_random(r)],
            {"marker": "^", "s": 46, "color": ORANGE, "edgecolors": "white", "zorder": 5},
        ),
        (
            "control: uniform pruning",
            [r for r in completed if is_uniform(r)],
            {"marker": "s", "s": 34, "color": GREEN, "edgecolors": "white", "zorder": 5},
        ),
    ]
    scaled = _scaled(x), _scaled(y)
    for label, group, style in layers:
        if group:
            points = [[scale(r) for r in group] for scale in scaled]
            style = {"linewidths": 0.8, **style}
            axes.scatter(points[0], points[1], label=label, **style)
    _draw_front(axes, completed, x, y)
    place = [
        value * _axis(name).scale
        for name in (x, y)
        if baseline and (value := dense_value(baseline, name)) is not None
    ]
    if len(place) == 2:
        star: Style = {"marker": "*", "s": 300, "color": VERMILLION, "edgecolors": "white"}
        axes.scatter(place[0], place[1], label="dense model", linewidths=1.0, zorder=7, **star)


def _draw_front(axes: Axes, completed: Sequence[TrialResult], x: str, y: str) -> None:
    """The staircase of what is attained: from the best x on, y holds until the next member."""
    front = front_of(completed, {y: direction_of(y), x: direction_of(x)})
    if not front:
        return
    xs, ys = [_scaled(x)(r) for r in front], [_scaled(y)(r) for r in front]
    axes.plot(xs, ys, drawstyle="steps-post", color=BLUE, lw=1.8, alpha=0.85, zorder=4)
    axes.plot([], [], color=BLUE, lw=1.8, marker="o", ms=7, mec="white", label="Pareto front")
    dot: Style = {"s": 52, "color": BLUE, "edgecolors": "white"}
    ring: Style = {"s": 120, "facecolors": "none", "edgecolors": BLUE, "linewidths": 1.5}
    for a, b, member in zip(xs, ys, front, strict=True):
        axes.scatter(a, b, zorder=6, **(ring if _is_control(member) else dot))


def _decorate(axes: Axes, x: str, y: str, title: str) -> None:
    for name, set_label in ((x, axes.set_xlabel), (y, axes.set_ylabel)):
        better = "higher" if direction_of(name) == "maximize" else "lower"
        set_label(f"{_axis(name).label}, {better} is better", fontsize=10.5, color=INK)
    if title:
        axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold", color=INK, pad=10)
    tidy(axes)
    axes.margins(0.06)


def _scaled(name: str) -> Callable[[TrialResult], float]:
    return lambda result: (result.metric(name) or 0.0) * _axis(name).scale


def _axis(metric: str) -> _Axis:
    name, probe = split(metric)
    axis = _AXES[name]
    return dataclasses.replace(axis, label=f"{axis.label} on {probe}") if probe else axis


def _is_random(result: TrialResult) -> bool:
    return result.criterion == "random"


def _is_control(result: TrialResult) -> bool:
    return _is_random(result) or is_uniform(result)


def _check(field: str, name: str, known: Sequence[str] | Mapping[str, Any]) -> None:
    if name not in known:
        hint = nearest(name, known) or "Choose one of these."
        raise ConfigError(
            f"`{field}` (={name}) must be one of {', '.join(known)}. {hint}".rstrip()
        )
