"""What a Ray worker does for one row at one seed: the dense model, then the row's trials."""

from __future__ import annotations

import copy
import dataclasses
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...methods.block_removal import rank_blocks
from ...methods.data import ImageData, Split
from ...methods.layer_attribution import score_layers
from ...methods.layer_bypass import bypass, bypassable_layers, zero
from ...methods.measure import count_macs
from ...methods.surgery import layer_widths, prune
from ..config import SearchConfig
from ..context import TrialContext, TrialSpec
from ..dense import prepare_dense
from ..keeper import shares
from ..prune import make_recipe
from ..records import FULL_FIDELITY, Candidate, TrialResult, TrialStatus, with_provenance
from ..setup import (
    PackedData,
    Problem,
    draw_model,
    find_groups,
    find_removable,
    load_state,
    make_model,
    make_task,
    trial_device,
    unpack_images,
)
from ..trial import recover_and_measure, run_trial
from .study import Row


@dataclass(frozen=True)
class Dense:
    """The dense model of one seed: its weights as arrays, and its row of the ledger."""

    state: Mapping[str, np.ndarray[Any, Any]]
    result: TrialResult


def train_dense(config: SearchConfig, row: Row, seed: int, images: PackedData) -> Dense:
    """Trains the dense model of a seed, or loads it from the cache or the checkpoint.

    Args:
        config: The study's config.
        row: A row of work `dense`.
        seed: Decides the initial weights and the training; the data split is the config's.
        images: From `pack_images`.
    """
    started = time.time()
    problem = _problem(row.config(config, seed), row, images)
    with tempfile.TemporaryDirectory() as folder:
        baseline = prepare_dense(problem, Path(folder), lambda message: None)
    result = TrialResult(
        trial_id=row.trial_ids(seed)[0],
        status=TrialStatus.COMPLETED,
        candidate=_provenance(Candidate(), row, source=baseline.source),
        widths=layer_widths(problem.model),
        accuracy=baseline.accuracy,
        accuracy_before_finetune=baseline.accuracy,
        accuracy_drop=0.0,
        loss=baseline.loss,
        macs=baseline.macs,
        num_params=baseline.num_params,
        peak_memory_mib=baseline.peak_memory_mib,
        fidelity=FULL_FIDELITY,
        epochs=float(baseline.epochs),
        finetune_s=baseline.train_s,
        seed=seed,
        host=platform.node(),
        device=str(problem.task.device),
        started_at=started,
        finished_at=time.time(),
    )
    state = {k: v.detach().cpu().numpy() for k, v in problem.model.state_dict().items()}
    return Dense(state, result)


def run_row(
    config: SearchConfig,
    row: Row,
    seed: int,
    images: PackedData,
    dense: Dense,
    keeper: Any,
) -> list[TrialResult]:
    """Runs one row at one seed.

    Args:
        config: The study's config.
        row: Any but a `dense` one.
        seed: Of everything drawn.
        images: From `pack_images`.
        dense: The dense model of the same seed and classes.
        keeper: Keeps what rows share, such as sparse-trained weights.

    Returns:
        The rows of the ledger, one for each of `row.trial_ids(seed)`.
    """
    problem = _problem(row.config(config, seed), row, images)
    load_state(problem.model, dense.state)
    accuracy = dense.result.accuracy
    assert accuracy is not None
    context = TrialContext(
        config=problem.config,
        task=problem.task,
        dense=problem.model.eval(),
        plan=problem.plan,
        baseline_accuracy=accuracy,
        measure_latency=None,
        shared=shares(keeper),
    )
    return _WORK[row.work](row, seed, context, problem)


def _trial(row: Row, seed: int, context: TrialContext, problem: Problem) -> list[TrialResult]:
    candidate = row.candidate(context.plan, context.config.ablate)
    if row.match is not None:
        candidate = _at_macs_of(row.match, candidate, seed, context)
    text = _provenance(candidate, row)
    spec = TrialSpec(row.trial_ids(seed)[0], candidate, text, seed)
    return [run_trial(spec, context).result]


def _at_macs_of(
    criterion: str, candidate: Candidate, seed: int, context: TrialContext
) -> Candidate:
    """The candidate with the MACs that `criterion` keeps under the candidate's rule."""
    other = dataclasses.replace(candidate, criterion=criterion)
    recipe, _ = make_recipe(other, context, seed)
    image = context.task.example_input()
    pruned = prune(context.dense, context.plan, recipe)
    fraction = count_macs(pruned, image) / count_macs(context.dense, image)
    return dataclasses.replace(candidate, select="macs", k=fraction)


def _blocks(row: Row, seed: int, context: TrialContext, problem: Problem) -> list[TrialResult]:
    """One trial for each number of removed blocks, in the order of the row."""
    ranking = rank_blocks(
        context.dense,
        context.task,
        problem.blocks,
        seed=seed,
        fresh=lambda: draw_model(context.config, context.task.num_classes),
        augment=context.config.data.augment,
        recalibration_images=context.config.recover.recalibration_images,
        **row.options,
    )
    measured = {step.removed: step.accuracy for step in ranking.path}
    if ranking.method == "sr_init":  # measured with blocks drawn anew, not without them
        measured = {}
    results = []
    for trial_id, point in zip(row.trial_ids(seed), row.points, strict=True):
        candidate = Candidate(dropped_blocks=tuple(sorted(ranking.drops[point])))
        accuracy = measured.get(ranking.drops[point])
        text = _provenance(candidate, row, point=point, calibration=accuracy)
        results.append(run_trial(TrialSpec(trial_id, candidate, text, seed), context).result)
    return results


def _layers(row: Row, seed: int, context: TrialContext, problem: Problem) -> list[TrialResult]:
    """One trial for each number of layers taken out, the least important first."""
    units = bypassable_layers(context.dense, context.task.example_input(2))
    generator = torch.Generator().manual_seed(seed)
    scores = score_layers(
        context.dense, context.task, list(units), score=row.options["score"], generator=generator
    )
    order = sorted(units, key=lambda unit: scores[unit])
    remove = {"bypass": bypass, "zero": zero}[row.options["mode"]]
    results = []
    for trial_id, point in zip(row.trial_ids(seed), row.points, strict=True):
        model = copy.deepcopy(context.dense)
        remove(model, [module for unit in order[:point] for module in units[unit]])
        text = _provenance(Candidate(), row, point=point, units=order[:point])
        result = TrialResult(trial_id, TrialStatus.COMPLETED, candidate=text, seed=seed)
        result.host, result.device = platform.node(), str(context.task.device)
        result.started_at = time.time()
        torch.manual_seed(seed)  # dropout draws from the global generator
        recovery = torch.Generator().manual_seed(seed)
        try:
            recover_and_measure(model, None, context, result, recovery)
        except FloatingPointError as error:  # this point's failure, not the curve's
            result.status, result.message = TrialStatus.FAILED, str(error)
        result.finished_at = time.time()
        results.append(result)
    return results


_WORK: dict[str, Callable[[Row, int, TrialContext, Problem], list[TrialResult]]] = {
    "trial": _trial,
    "blocks": _blocks,
    "layers": _layers,
}


# --- the problem of a row --------------------------------------------------------------------


def _problem(config: SearchConfig, row: Row, images: PackedData) -> Problem:
    """As `pose` makes it, from data that are already here; seeded, untrained."""
    device = trial_device(config)
    task = make_task(config, first_classes(unpack_images(images), row.num_classes), device)
    model = make_model(config, task.num_classes).to(device).eval()
    example = task.example_input(2)
    plan = find_groups(config, model, example)
    return Problem(config, task, model, plan, find_removable(config, model, example))


def first_classes(data: ImageData, count: int | None) -> ImageData:
    """The images of the first `count` classes; all for None."""
    if count is None:
        return data

    def cut(split: Split) -> Split:
        chosen = split.labels < count
        return Split(split.images[chosen], split.labels[chosen])

    return dataclasses.replace(
        data,
        classes=data.classes[:count],
        train=cut(data.train),
        val=cut(data.val),
        test=cut(data.test),
    )


def _provenance(candidate: Candidate, row: Row, **facts: Any) -> str:
    names = {"row": row.key, "label": row.label, "group": row.group}
    return with_provenance(candidate, names | facts)
