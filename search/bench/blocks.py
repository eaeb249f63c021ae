"""`prune-search bench blocks`: suffix-only block ranking against full forward passes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ...methods.block_removal import BlockRanking, rank_blocks
from ...methods.blocks import removable_blocks
from ..environment import environment
from .common import digits_problem, torch_threads

GREEDY_STEPS = 3


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
    with torch_threads(threads):
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


def _compare(name: str, images: int, rounds: int, order: str) -> dict[str, Any]:
    model, task = digits_problem(name, images)
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
