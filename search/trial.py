"""One trial: score -> select -> prune -> recover -> measure. Knows neither Ray nor Optuna."""

from __future__ import annotations

import copy
import dataclasses
import math
import platform
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..methods.finetune import Finetuning, recalibrate_batch_norm
from ..methods.measure import count_macs, count_params, peak_memory_mib
from ..methods.shapes import copy_state
from ..methods.surgery import Recipe, layer_widths, prune
from ..methods.tasks import SplitName, quick_split
from .config import DEFAULT_PROBE
from .context import TrialContext, TrialSpec
from .deaths import is_disk_full
from .early_stop import RISING
from .finished import fill_in, find_finished, share_finished
from .metrics import further
from .prune import make_recipe, prune_by_blocks, start_of
from .records import FULL_FIDELITY, TrialResult, TrialStatus, violations
from .work import Work, make_training


@dataclass
class TrialOutcome:
    """A trial's row and what goes with it; all but the row are None when the trial failed.

    Attributes:
        result: The row.
        recipe: What was removed.
        state: The final weights; None before the full fidelity.
        work: What is needed to go on, where the trial waits at a lower fidelity.
    """

    result: TrialResult
    recipe: Recipe | None = None
    state: dict[str, Tensor] | None = None
    work: Work | None = None


def run_trial(spec: TrialSpec, context: TrialContext, work: Work | None = None) -> TrialOutcome:
    """Runs one trial up to a fidelity. Every failure becomes a row with its status and message.

    However often it waits between, and wherever it goes on, it ends with the same weights.

    Args:
        spec: The trial.
        context: The worker's shared parts.
        work: Where a trial that waited goes on; when it is lost, the trial starts afresh.

    Returns:
        The row. Its `wait_s` is the time spent waiting for the latency probe or another trial.
    """
    if spec.row is None:
        result = spec.new_row(TrialStatus.COMPLETED)
        result.started_at = time.time()
    else:
        result = dataclasses.replace(spec.row, status=TrialStatus.COMPLETED, message="")
    result.host, result.device = platform.node(), str(context.task.device)
    outcome = TrialOutcome(result)
    try:
        if spec.fidelity < FULL_FIDELITY or not _reuse(spec, context, outcome):
            _run(spec, context, outcome, work)
            share_finished(spec, context, outcome)
    except Exception as error:  # whatever a foreign model does is this trial's failure alone
        if is_disk_full(error):
            raise  # not the trial's fault: the run is broken off
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"
        if _is_out_of_memory(error):
            message = f"out of memory: {error}. Lower data.batch_size."
        _fail(outcome, message)
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
    work = _recalibrated(model, recipe, context, result, generator)
    _climb(work, FULL_FIDELITY, context, result)


def _reuse(spec: TrialSpec, context: TrialContext, outcome: TrialOutcome) -> bool:
    """Takes over the end of an equal trial of an earlier run, if there is one.

    Only the end: were the rungs before it skipped, what is promoted and then proposed would depend
    on the runs before.
    """
    found = find_finished(spec, context)
    if found is None:
        return False
    result, info = outcome.result, found.info
    fill_in(result, info["row"])
    outcome.recipe = Recipe.from_json(info["recipe"])
    outcome.state = dict(found.tensors)
    if spec.row is None:
        with _clock(result, "measure_s"):
            _measure_latency(outcome.recipe, context, result)
    row = info["row"]
    figures = {"accuracy": row["accuracy"], "loss": row["loss"], **row["metrics"]}
    _report(result, figures, context, FULL_FIDELITY, row["epochs"])
    result.message = "; ".join(filter(None, [result.message, f"reused: {info['source']}"]))
    return True


def _run(spec: TrialSpec, context: TrialContext, outcome: TrialOutcome, work: Work | None) -> None:
    if work is None:
        work = _pruned(spec, context, outcome.result)
    _climb(work, spec.fidelity, context, outcome.result)
    outcome.recipe = work.recipe
    if outcome.result.status is TrialStatus.EARLY_STOPPED:
        outcome.work = work
    elif work.fidelity == FULL_FIDELITY:
        outcome.state = copy_state(work.model)


# --- the stages ------------------------------------------------------------------------------


def _pruned(spec: TrialSpec, context: TrialContext, result: TrialResult) -> Work:
    """Scores, selects, removes and recalibrates."""
    generator = torch.Generator().manual_seed(spec.seed)
    torch.manual_seed(spec.seed)  # dropout draws from the global generator
    with _clock(result, "score_s"):
        start = start_of(spec.candidate, context)
        recipe, waited = make_recipe(spec.candidate, context, spec.seed, start)
        result.wait_s += start.waited_s + waited
    reconstructed = context.config.recover.reconstruct.steps > 0 and bool(recipe.kept)
    if reconstructed:
        with _clock(result, "finetune_s"):
            model, recipe = prune_by_blocks(spec.candidate, start, recipe, context, spec.seed)
    else:
        with _clock(result, "prune_s"):
            model = prune(start.model, context.plan, recipe)
    work = _recalibrated(model, recipe, context, result, generator)
    work.reconstructed = reconstructed
    return work


def _recalibrated(
    model: nn.Module,
    recipe: Recipe | None,
    context: TrialContext,
    result: TrialResult,
    generator: torch.Generator,
) -> Work:
    if context.config.recover.recalibrate_bn:
        with _clock(result, "finetune_s"):
            _recalibrate(model, context, generator)
    return Work(model, recipe, make_training(model, context, generator))


def _climb(work: Work, fidelity: int, context: TrialContext, result: TrialResult) -> None:
    """Trains as far as `fidelity` asks, and reports; the first time it also measures."""
    if result.accuracy_before_finetune is None:
        with _clock(result, "finetune_s"):
            split: SplitName = "val" if work.training is None else quick_split(context.task)
            metrics = context.task.evaluate(work.model, split)
            result.accuracy_before_finetune = metrics["accuracy"]
        with _clock(result, "measure_s"):
            _measure(work.model, work.recipe, context, result)
    training, share = work.training, 0.0
    if fidelity > 0 and training is not None:
        with _clock(result, "finetune_s"):
            training.run(_num_steps(training, fidelity, context))
            metrics = _evaluate(work.model, fidelity, context)
        share = training.step / training.num_steps if training.num_steps else 1.0
    _report(result, metrics, context, fidelity, share * context.config.recover.epochs)
    work.fidelity = fidelity


def _num_steps(training: Finetuning, fidelity: int, context: TrialContext) -> int:
    if fidelity == FULL_FIDELITY:
        return training.num_steps
    return max(1, round(context.config.search.short_share * training.num_steps))


def _evaluate(model: nn.Module, fidelity: int, context: TrialContext) -> dict[str, float]:
    """Validation metrics. In mid-schedule of a copy whose batch norms are recalibrated.

    At a high learning rate the running statistics lag behind the weights.
    """
    if fidelity < FULL_FIDELITY and context.config.recover.recalibrate_bn:
        model = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(context.config.search.seed)
        _recalibrate(model, context, generator)
    split: SplitName = "val" if fidelity == FULL_FIDELITY else quick_split(context.task)
    return context.task.evaluate(model, split)


def _recalibrate(model: nn.Module, context: TrialContext, generator: torch.Generator) -> None:
    images = context.config.recover.recalibration_images
    recalibrate_batch_norm(model, context.task, generator=generator, num_images=images)


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
    found, busy_s = context.measure_latency(recipe)
    result.wait_s += max(0.0, time.perf_counter() - start - busy_s)
    latency = found[DEFAULT_PROBE]
    result.speedup = latency.speedup
    result.latency_ms = latency.latency_ms
    result.latency_ms_p10 = latency.latency_ms_p10
    result.latency_ms_p90 = latency.latency_ms_p90
    named = {name: latency for name, latency in found.items() if name != DEFAULT_PROBE}
    result.latency_ms_by_probe = {name: one.latency_ms for name, one in named.items()}
    result.speedup_by_probe = {name: one.speedup for name, one in named.items()}


def _report(
    result: TrialResult,
    metrics: Mapping[str, float],
    context: TrialContext,
    fidelity: int,
    epochs: float,
) -> None:
    """Fills in accuracy and status at the fidelity that was reached."""
    if not math.isfinite(metrics["loss"]):
        raise FloatingPointError(f"the validation loss is {metrics['loss']}")
    result.fidelity, result.epochs = fidelity, epochs
    full = fidelity == FULL_FIDELITY
    result.accuracy = metrics["accuracy"]
    result.loss = metrics["loss"]
    result.metrics = further(metrics)
    result.accuracy_drop = context.baseline_accuracy - metrics["accuracy"]
    known: list[float | None] = list(result.accuracy_by_fidelity)
    if full and epochs > 0 and not known:
        known = [result.accuracy_before_finetune]
    padding = [None] * (fidelity - len(known))
    result.accuracy_by_fidelity = [*known, *padding, result.accuracy]
    bounds = [c for c in context.config.constraints if full or c.metric not in RISING]
    broken = {k: v for k, v in violations(bounds, result).items() if v > 0}
    if broken:  # by what it costs, a trial is infeasible for good: nothing is gained by training
        result.status = TrialStatus.INFEASIBLE
        result.message = "; ".join(f"violates {k} by {v:.4g}" for k, v in broken.items())
    elif not full:
        result.status = TrialStatus.EARLY_STOPPED


def _is_out_of_memory(error: Exception) -> bool:
    """On the CPU torch raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "CPUAllocator" in str(error)


def _fail(outcome: TrialOutcome, message: str) -> None:
    outcome.result.status = TrialStatus.FAILED
    outcome.result.message = " ".join(message.split())
    outcome.recipe = outcome.state = outcome.work = None


@contextmanager
def _clock(result: TrialResult, column: str) -> Iterator[None]:
    start = time.perf_counter()
    waited = result.wait_s
    try:
        yield
    finally:
        spent = time.perf_counter() - start - (result.wait_s - waited)
        setattr(result, column, getattr(result, column) + spent)
