"""One trial: score -> select -> prune -> recover -> measure. Knows neither Ray nor Optuna."""

from __future__ import annotations

import json
import math
import platform
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..methods.finetune import finetune, recalibrate_batch_norm
from ..methods.measure import count_macs, count_params, peak_memory_mib
from ..methods.shapes import copy_state
from ..methods.surgery import Recipe, layer_widths, prune
from .context import TrialContext, TrialSpec
from .finished import fill_in, find_finished, share_finished
from .prune import make_recipe, prune_by_blocks, start_of
from .records import FULL_FIDELITY, Candidate, TrialResult, TrialStatus, violations


@dataclass
class TrialOutcome:
    """A trial's row, and what is needed to export it; `state` is None when the trial failed."""

    result: TrialResult
    recipe: Recipe | None = None
    state: dict[str, Tensor] | None = None


def run_trial(spec: TrialSpec, context: TrialContext) -> TrialOutcome:
    """Runs one trial to its end. Every failure becomes a row with its status and message.

    Args:
        spec: The trial.
        context: The worker's shared parts.

    Returns:
        The row. Its `wait_s` is the time spent waiting for the latency probe or another trial.
    """
    result = TrialResult(
        trial_id=spec.trial_id,
        status=TrialStatus.COMPLETED,
        criterion=spec.candidate.criterion,
        candidate=spec.candidate_json,
        dropped_blocks=list(spec.candidate.dropped_blocks),
        seed=spec.seed,
        host=platform.node(),
        device=str(context.task.device),
        started_at=time.time(),
    )
    outcome = TrialOutcome(result)
    try:
        if not _reuse(spec, context, outcome):
            _run(spec, context, outcome)
            share_finished(spec, context, outcome)
    except (MemoryError, torch.OutOfMemoryError) as error:
        _fail(outcome, f"out of memory: {error}. Lower data.batch_size.")
    except Exception as error:  # whatever a foreign model does is this trial's failure alone
        where = traceback.extract_tb(error.__traceback__)[-1]
        _fail(outcome, f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})")
    result.finished_at = time.time()
    return outcome


def recover_and_measure(
    model: nn.Module,
    recipe: Recipe | None,
    context: TrialContext,
    result: TrialResult,
    generator: torch.Generator,
) -> None:
    """Gives a pruned model its accuracy back and fills in what is measured of it.

    Args:
        model: Changed in place.
        recipe: What was removed; None where no recipe says it, and latency is not measured.
        context: The worker's shared parts.
        result: The trial's row.
        generator: Draws the images of recovery.

    Raises:
        FloatingPointError: If a loss is not finite.
    """
    task, recover = context.task, context.config.recover
    with _clock(result, "finetune_s"):
        if recover.recalibrate_bn:
            recalibrate_batch_norm(model, task, generator=generator)
        metrics = task.evaluate(model, "val")
        result.accuracy_before_finetune = metrics["accuracy"]
    with _clock(result, "measure_s"):
        _measure(model, recipe, context, result)
    if recover.epochs > 0:
        with _clock(result, "finetune_s"):
            finetune(
                model,
                task,
                epochs=recover.epochs,
                lr=recover.lr,
                momentum=recover.momentum,
                weight_decay=recover.weight_decay,
                milestones=recover.milestones,
                gamma=recover.gamma,
                generator=generator,
                augment=context.config.data.augment,
                teacher=context.dense if recover.distill > 0 else None,
                distill=recover.distill,
            )
            metrics = task.evaluate(model, "val")
    _report(result, metrics, context)
    result.epochs = recover.epochs
    result.fidelity = FULL_FIDELITY


def _reuse(spec: TrialSpec, context: TrialContext, outcome: TrialOutcome) -> bool:
    """Takes over the end of an equal trial of an earlier run, if there is one."""
    found = find_finished(spec, context)
    if found is None:
        return False
    result, info = outcome.result, found.info
    fill_in(result, info["row"])
    outcome.recipe = Recipe.from_json(info["recipe"])
    outcome.state = dict(found.tensors)
    with _clock(result, "measure_s"):
        _measure_latency(outcome.recipe, context, result)
    _report(result, info["row"], context)
    result.message = "; ".join(filter(None, [result.message, f"reused: {info['source']}"]))
    return True


def _run(spec: TrialSpec, context: TrialContext, outcome: TrialOutcome) -> None:
    result = outcome.result
    generator = torch.Generator().manual_seed(spec.seed)
    torch.manual_seed(spec.seed)  # dropout draws from the global generator
    with _clock(result, "score_s"):
        start = start_of(spec.candidate, context)
        recipe, waited = make_recipe(spec.candidate, context, spec.seed, start)
        result.wait_s += start.waited_s + waited
    if context.config.recover.reconstruct.steps > 0 and recipe.kept:
        with _clock(result, "finetune_s"):
            model, recipe = prune_by_blocks(spec.candidate, start, recipe, context, spec.seed)
    else:
        with _clock(result, "prune_s"):
            model = prune(start.model, context.plan, recipe)
    recover_and_measure(model, recipe, context, result, generator)
    outcome.recipe = recipe
    outcome.state = copy_state(model)


def _measure(
    model: nn.Module, recipe: Recipe | None, context: TrialContext, result: TrialResult
) -> None:
    example = context.task.example_input(context.config.latency.batch_size)
    result.widths = layer_widths(model)
    result.macs = count_macs(model, example)
    result.num_params = count_params(model)
    result.peak_memory_mib = peak_memory_mib(model, example)
    if recipe is not None:
        _measure_latency(recipe, context, result)


def _measure_latency(recipe: Recipe, context: TrialContext, result: TrialResult) -> None:
    if context.measure_latency is None:
        return
    start = time.perf_counter()
    latency, busy_s = context.measure_latency(recipe)
    result.wait_s += max(0.0, time.perf_counter() - start - busy_s)
    result.speedup = latency.speedup
    result.latency_ms = latency.latency_ms
    result.latency_ms_p10 = latency.latency_ms_p10
    result.latency_ms_p90 = latency.latency_ms_p90


def _report(result: TrialResult, metrics: Mapping[str, float], context: TrialContext) -> None:
    if not math.isfinite(metrics["loss"]):
        raise FloatingPointError(f"the validation loss is {metrics['loss']}")
    result.accuracy = metrics["accuracy"]
    result.loss = metrics["loss"]
    result.accuracy_drop = context.baseline_accuracy - metrics["accuracy"]
    broken = {k: v for k, v in violations(context.config.constraints, result).items() if v > 0}
    if broken:
        result.status = TrialStatus.INFEASIBLE
        result.message = "; ".join(f"violates {k} by {v:.4g}" for k, v in broken.items())


def _fail(outcome: TrialOutcome, message: str) -> None:
    outcome.result.status = TrialStatus.FAILED
    outcome.result.message = " ".join(message.split())
    outcome.recipe = outcome.state = None


@contextmanager
def _clock(result: TrialResult, column: str) -> Iterator[None]:
    start = time.perf_counter()
    waited = result.wait_s
    try:
        yield
    finally:
        spent = time.perf_counter() - start - (result.wait_s - waited)
        setattr(result, column, getattr(result, column) + spent)


def with_provenance(candidate: Candidate, provenance: Mapping[str, object]) -> str:
    """The candidate's JSON for the ledger, with where it came from beside it."""
    return json.dumps(json.loads(candidate.to_json()) | dict(provenance), sort_keys=True)
