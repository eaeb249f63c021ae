"""Benchmarks as commands; each prints one table. Ratios come from one process, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.table import Table
from torch import nn

from ..methods.block_removal import BlockRanking, rank_blocks
from ..methods.blocks import removable_blocks
from ..methods.criteria import CRITERIA, score_channels
from ..methods.data import load_data
from ..methods.groups import plan_pruning
from ..methods.models.build import build_model
from ..methods.tasks.classification import ClassificationTask
from ..methods.trace import evaluating
from .environment import environment

BATCH = 128  # the default of a task
GREEDY_STEPS = 3
MOST_PASSES = 20  # that a criterion may cost
UNBOUNDED = ("hrank", "synflow")  # one SVD a feature map; a hundred rounds


def bench_blocks(
    *, model: str = "resnet56", images: int = 1000, rounds: int = 3, threads: int = 1
) -> dict[str, Any]:
    """Times block ranking from each block on against full forward passes.

    The model's weights are as initialised (only time and equality matter); the images are digits
    at 32 px. Both ways run in turn in each round.

    Args:
        model: A name that `build_model` takes.
        images: Calibration images.
        rounds: Rounds; the median is reported.
        threads: Torch threads.

    Returns:
        The table's rows and the hardware.
    """
    with _threads(threads):
        rows = [_compare(model, images, rounds, order) for order in ("oneshot", "greedy")]
    result = {"model": model, "images": images, "threads": threads, "rows": rows}
    return result | {"environment": environment()}


def blocks_table(result: Mapping[str, Any]) -> Table:
    """`bench_blocks` for people."""
    table = Table(
        title=f"Block ranking of {result['model']}, {result['images']} images, "
        f"{result['threads']} thread(s), {result['environment']['cpu']}"
    )
    for column in ("order", "evaluations", "full s", "suffix s", "ratio (range)", "equal"):
        table.add_column(column)
    for row in result["rows"]:
        ratio = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        times = (f"{row['full_s']:.1f}", f"{row['suffix_s']:.1f}")
        equal = "to the last digit" if row["equal"] else "NO"
        table.add_row(row["order"], str(row["evaluations"]), *times, ratio, equal)
    return table


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
    net, task = _setup(model, images)
    layers = plan_pruning(net, task.example_input(2)).layers
    passes: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in criteria}
    with _threads(threads):
        for _ in range(rounds):
            passes.append(_seconds(lambda: _pass(net, task)))
            for name, times in seconds.items():
                times.append(_seconds(lambda name=name: score_channels(name, net, task, layers)))  # type: ignore[misc]
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


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _compare(name: str, images: int, rounds: int, order: str) -> dict[str, Any]:
    model, task = _setup(name, images)
    blocks = removable_blocks(model, task.example_input(2))

    def rank(suffix_only: bool) -> BlockRanking:
        return rank_blocks(
            model,
            task,
            blocks,
            order=order,  # type: ignore[arg-type]
            max_drop=GREEDY_STEPS,
            suffix_only=suffix_only,
        )

    pairs = [(rank(True), rank(False)) for _ in range(rounds)]
    ratios = [full.seconds / suffix.seconds for suffix, full in pairs]
    return {
        "order": order if order == "oneshot" else f"greedy, {GREEDY_STEPS} deep",
        "evaluations": pairs[0][0].evaluations,
        "suffix_s": statistics.median(suffix.seconds for suffix, _ in pairs),
        "full_s": statistics.median(full.seconds for _, full in pairs),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "equal": all((a.order, a.path) == (b.order, b.path) for a, b in pairs),
    }


def _setup(name: str, images: int) -> tuple[nn.Module, ClassificationTask]:
    torch.manual_seed(0)
    model = build_model(name, num_classes=10)
    data = load_data("digits", image_size=32)
    return model, ClassificationTask(data, batch_size=BATCH, calibration_size=images)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
