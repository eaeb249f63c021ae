"""`prune-search bench recalibration`: how many images batch-norm recalibration needs."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
from rich.table import Table
from torch import nn

from ...methods.finetune import recalibrate_batch_norm
from ...methods.surgery import prune
from ..config import ConfigError, SearchConfig
from ..context import TrialContext
from ..dense import prepare_dense
from ..environment import environment
from ..progress import Progress
from ..prune import make_recipe
from ..records import Candidate, TrialResult, TrialStatus
from ..setup import make_space, pose
from ..space import Space
from ..surrogate.variation import Variation
from ..trial import recover_and_measure
from .common import spread, torch_threads

SIZES = (128, 256, 512, 1024, 2048)
DRAWS = 100  # for each candidate that is asked for


def bench_recalibration(
    config: SearchConfig, progress: Progress, *, candidates: int = 40, seeds: int = 5
) -> dict[str, Any]:
    """Compares accuracies after recalibration on few images with those on all training images.

    Random candidates of the config's space are pruned once. Their order by accuracy before
    fine-tuning is compared with that on all images, and with that after the config's recovery.

    Args:
        config: Model, data, space and recovery.
        progress: Where to report.
        candidates: How many candidates.
        seeds: Draws of the images, for each candidate and number.

    Returns:
        A row for each number of images: rank correlations and mean absolute difference, one a
        seed, and seconds a candidate.

    Raises:
        ConfigError: If the config's recovery has nothing to compare.
    """
    _check(config)
    with tempfile.TemporaryDirectory() as folder, torch_threads(1):
        problem = pose(config)
        accuracy = prepare_dense(problem, Path(folder), progress.say).accuracy
        space = make_space(problem, Path(folder), progress.say)
        context = TrialContext(config, problem.task, problem.model, problem.plan, accuracy, None)
        models, final = [], []
        for number, candidate in enumerate(_draw(space, candidates)):
            recipe, _ = make_recipe(candidate, context, number)
            model = prune(problem.model, problem.plan, recipe)
            try:
                final.append(_recovered(model, context, number))
            except FloatingPointError as error:
                progress.say(f"candidate {number} is left out: {error}")
                continue
            models.append(model)
        everything = [_accuracy(model, context, problem.task.num_train, 0) for model in models]
        sizes = [size for size in SIZES if size < problem.task.num_train]
        rows = [_row(size, models, context, everything, final, seeds) for size in sizes]
    return {
        "model": config.model.name,
        "data": config.data.name,
        "images": {"train": problem.task.num_train, "val": len(problem.task.data.val)},
        "epochs": config.recover.epochs,
        "candidates": len(models),
        "seeds": seeds,
        "all_against_final": _rank(everything, final),
        "rows": rows,
        "environment": environment(),
    }


def recalibration_table(result: Mapping[str, Any]) -> Table:
    """`bench_recalibration` for people."""
    table = Table(
        title=f"Batch-norm recalibration: {result['candidates']} random candidates, "
        f"{result['model']} on {result['data']} ({result['images']['train']} train, "
        f"{result['images']['val']} val), 1 thread, {result['environment']['cpu']}",
        caption=f"Median and range over {result['seeds']} draws of the images. Spearman's rank "
        "correlation of the accuracies before fine-tuning; those on all images against the "
        f"accuracies after {result['epochs']:g} epochs: {result['all_against_final']:.4f}.",
    )
    for column in (
        "images",
        "rank against all images",
        "rank against after fine-tuning",
        "mean |difference| of accuracy",
        "seconds",
    ):
        table.add_column(column)
    for row in result["rows"]:
        spreads = (spread(row[name], 4) for name in ("against_all", "against_final", "difference"))
        table.add_row(str(row["images"]), *spreads, f"{row['seconds']:.3f}")
    return table


def _check(config: SearchConfig) -> None:
    recover = config.recover
    for key, value, bad, rule in (
        ("recover.epochs", recover.epochs, recover.epochs == 0, "be above 0"),
        ("recover.recalibrate_bn", False, not recover.recalibrate_bn, "be true"),
        (
            "recover.reconstruct.steps",
            recover.reconstruct.steps,
            recover.reconstruct.steps,
            "be 0",
        ),
        (
            "space.criteria",
            "dsd",
            "dsd" in config.space.criterion_names,
            "name no sparse training",
        ),
    ):
        if bad:
            raise ConfigError(
                f"`{key}` (={value}) must {rule}: candidates are pruned once, recalibrated on few "
                "images and on many, and compared with their fine-tuned selves. Change it."
            )


def _draw(space: Space, count: int) -> list[Candidate]:
    """Random candidates, each once; fewer where the space has no more."""
    variation = Variation(space, np.random.default_rng(0))
    drawn = (space.candidate(variation.random()) for _ in range(DRAWS * count))
    return list(dict.fromkeys(drawn))[:count]


def _recovered(model: nn.Module, context: TrialContext, seed: int) -> float:
    """Accuracy of a copy after the config's whole recovery."""
    result = TrialResult("", TrialStatus.COMPLETED)
    generator = torch.Generator().manual_seed(seed)
    recover_and_measure(copy.deepcopy(model), None, context, result, generator)
    assert result.accuracy is not None
    return result.accuracy


def _accuracy(model: nn.Module, context: TrialContext, images: int, seed: int) -> float:
    """Accuracy after recalibration alone, in place: the statistics are made anew each time."""
    generator = torch.Generator().manual_seed(seed)
    recalibrate_batch_norm(model, context.task, generator=generator, num_images=images)
    return float(context.task.evaluate(model, "val")["accuracy"])


def _row(
    images: int,
    models: Sequence[nn.Module],
    context: TrialContext,
    everything: Sequence[float],
    final: Sequence[float],
    seeds: int,
) -> dict[str, Any]:
    row: dict[str, list[float]] = {"against_all": [], "against_final": [], "difference": []}
    spent = 0.0
    for seed in range(seeds):
        start = time.perf_counter()
        found = [  # each on its own images, as trials have them
            _accuracy(model, context, images, seed * len(models) + number)
            for number, model in enumerate(models)
        ]
        spent += time.perf_counter() - start
        row["against_all"].append(_rank(found, everything))
        row["against_final"].append(_rank(found, final))
        row["difference"].append(float(np.abs(np.subtract(found, everything)).mean()))
    return row | {"images": images, "seconds": spent / (seeds * len(models))}


def _rank(one: Sequence[float], other: Sequence[float]) -> float:
    return float(scipy.stats.spearmanr(one, other)[0])
