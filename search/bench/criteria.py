"""`prune-search bench criteria`: seconds of each criterion beside one pass over its images."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import nn

from ...methods.criteria import CRITERIA, score_channels
from ...methods.groups import plan_pruning
from ...methods.tasks.classification import ClassificationTask
from ...methods.trace import evaluating
from ..environment import environment
from .common import digits_problem, seconds_of, torch_threads

MOST_PASSES = 20  # that a criterion may cost
UNBOUNDED = ("hrank", "synflow")  # one SVD a feature map; a hundred rounds


def bench_criteria(
    *,
    model: str = "resnet56",
    images: int = 512,
    rounds: int = 3,
    threads: int = 1,
    criteria: Sequence[str] = tuple(CRITERIA),
) -> dict[str, Any]:
    """Times criteria against one forward and backward pass over the calibration split.

    The model's weights are as initialised (only time matters); the images are digits at 32 px.
    All layers of the model's channel groups are scored. Each round times the pass and then each
    criterion, with its default options.

    Args:
        model: A name that `build_model` takes.
        images: Calibration images.
        rounds: Rounds; the median is reported.
        threads: Torch threads.
        criteria: Which criteria.

    Returns:
        The table's rows, the seconds of a pass, and the hardware.
    """
    net, task = digits_problem(model, images)
    layers = plan_pruning(net, task.example_input(2)).layers
    passes: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in criteria}
    with torch_threads(threads):
        for _ in range(rounds):
            passes.append(seconds_of(lambda: _pass(net, task)))
            for name, times in seconds.items():
                times.append(seconds_of(lambda name=name: score_channels(name, net, task, layers)))  # type: ignore[misc]
    rows = [_cost(name, times, passes) for name, times in seconds.items()]
    return {
        "model": model,
        "images": images,
        "threads": threads,
        "pass_s": statistics.median(passes),
        "rows": rows,
        "environment": environment(),
    }


def criteria_table(result: Mapping[str, Any]) -> Table:
    """`bench_criteria` for people."""
    table = Table(
        title=f"Criteria on {result['model']}, {result['images']} images, "
        f"{result['threads']} thread(s), {result['environment']['cpu']}; one forward and backward "
        f"pass takes {result['pass_s']:.2f} s"
    )
    for column in ("criterion", "s", "passes (range)", f"at most {MOST_PASSES}"):
        table.add_column(column)
    for row in result["rows"]:
        passes = f"{row['passes']:.2f} ({row['passes_low']:.2f} to {row['passes_high']:.2f})"
        bounded = row["criterion"] not in UNBOUNDED
        within = ("yes" if row["passes"] <= MOST_PASSES else "NO") if bounded else "not bounded"
        table.add_row(row["criterion"], f"{row['seconds']:.3f}", passes, within)
    return table


def _cost(name: str, seconds: list[float], passes: list[float]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(seconds, passes, strict=True)]
    return {
        "criterion": name,
        "seconds": statistics.median(seconds),
        "passes": statistics.median(ratios),
        "passes_low": min(ratios),
        "passes_high": max(ratios),
    }


def _pass(model: nn.Module, task: ClassificationTask) -> None:
    with evaluating(model):
        for images, target in task.calibration_batches():
            loss = task.loss(model(images), target)
            torch.autograd.grad(loss, list(model.parameters()))
