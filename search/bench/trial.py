"""`prune-search bench trial`: a trial beside the same steps written plainly, and its own profile.

Both run in one process, in turn, on the same candidates. Latency is measured by neither: a probe
of its own does it, the same for every trial.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn

from ...methods.finetune import finetune, recalibrate_batch_norm
from ...methods.measure import count_macs, peak_memory_mib
from ...methods.shapes import copy_state
from ...methods.surgery import prune
from ..config import SearchConfig, parse_config
from ..context import TrialContext, TrialSpec
from ..environment import environment
from ..prune import make_recipe
from ..records import Candidate, TrialStatus, with_provenance
from ..setup import pose
from ..space import Space
from ..surrogate.variation import Variation
from ..trial import TrialOutcome, run_trial
from .common import spread, torch_threads
from .plain import PlainOutcome, plain_trial

A_RUN = 40  # trials that share the scores: the default of `search.trials`
DENSE_EPOCHS = 5


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Seconds of one candidate's trial, plain and ours, without and with one epoch."""

    criterion: str
    plain: tuple[float, float]
    ours: tuple[float, float]
    same_channels: bool
    before: float
    after: float


def bench_trial(
    *,
    model: str = "resnet20",
    image_size: int = 16,
    rounds: int = 5,
    limit: int | None = None,
    threads: int = 1,
) -> dict[str, Any]:
    """Times trials of candidates drawn from the default space, one of each criterion a round.

    Args:
        model: A residual network of the zoo; trained for a few epochs first.
        image_size: Pixels of the digits.
        rounds: Seeds; each draws candidates of its own.
        limit: The most train and val images to use.
        threads: Torch threads.

    Returns:
        The ratios, the equality of the results, the profile, and the hardware.
    """
    with torch_threads(threads):
        context, space = _problem(model, image_size, limit)
        plain_dense = copy.deepcopy(context.dense).to(memory_format=torch.contiguous_format)
        score_s = _fill_scores(context)
        pairs = []
        equal: list[bool] = []
        for seed in range(rounds):
            candidates = _draw(space, seed)
            if seed == 0:
                equal = [_equal(one, context, plain_dense, seed) for one in candidates]
            pairs.append([_time(one, context, plain_dense, seed) for one in candidates])
        profile = _profile(context, _draw(space, 0)[0])
    flat = [pair for row in pairs for pair in row]
    return {
        "model": model,
        "image_size": image_size,
        "images": {"train": context.task.num_train, "val": len(context.task.data.val)},
        "threads": threads,
        "rounds": rounds,
        "rows": [_ratios(pairs, score_s, epochs) for epochs in (0, 1)],
        "equal_to_the_last_digit": all(equal),
        "same_channels": sum(pair.same_channels for pair in flat) / len(flat),
        "most_before": max(abs(pair.before) for pair in flat),
        "most_after": max(abs(pair.after) for pair in flat),
        "mean_after": statistics.fmean(pair.after for pair in flat),
        "score_s": score_s,
        "profile": profile,
        "environment": environment(),
    }


def trial_tables(result: Mapping[str, Any]) -> list[Table]:
    """`bench_trial` for people: the ratios, and where a trial's time goes."""
    where = (
        f"{result['model']}, digits at {result['image_size']} px "
        f"({result['images']['train']} train, {result['images']['val']} val), "
        f"{result['threads']} thread(s), {result['environment']['cpu']}"
    )
    equal = "equal to the last digit" if result["equal_to_the_last_digit"] else "NOT EQUAL"
    table = Table(
        title=f"A trial beside the same steps with torch-pruning and no caches: {where}",
        caption=f"Median and range over {result['rounds']} seeds. Results in one memory layout: "
        f"{equal}. In the trials' own layout: the same channels in "
        f"{result['same_channels']:.0%} of the trials, accuracy apart by at most "
        f"{result['most_before']:.4f} before and {result['most_after']:.4f} after fine-tuning "
        f"(on average {result['mean_after']:+.4f}).",
    )
    for column in ("fine-tuning", "plain s", "ours s", "ratio", f"with scoring, {A_RUN} trials"):
        table.add_column(column)
    for row in result["rows"]:
        table.add_row(
            "none" if row["epochs"] == 0 else "1 epoch",
            f"{row['plain_s']:.3f}",
            f"{row['ours_s']:.3f}",
            spread(row["ratio"], 2),
            spread(row["ratio_with_scores"], 2),
        )
    profile = Table(title=f"Where a trial's time goes: {where}")
    for column in ("step", "ms (range)", "share without fine-tuning", "share with one epoch"):
        profile.add_column(column)
    total = sum(row["seconds"] for row in result["profile"])
    free = sum(row["seconds"] for row in result["profile"] if not row["tuning"])
    for row in result["profile"]:
        profile.add_row(
            row["step"],
            f"{1000 * row['seconds']:.1f} ({1000 * row['low']:.1f} to {1000 * row['high']:.1f})",
            "" if row["tuning"] else f"{row['seconds'] / free:.0%}",
            f"{row['seconds'] / total:.0%}",
        )
    return [table, profile]


# --- the problem -----------------------------------------------------------------------------


def _problem(model: str, image_size: int, limit: int | None) -> tuple[TrialContext, Space]:
    data = {"name": "digits", "image_size": image_size, "limit": limit}
    config = parse_config({"model": {"name": model}, "data": data})
    problem = pose(config)
    generator = torch.Generator().manual_seed(0)
    finetune(problem.model, problem.task, epochs=DENSE_EPOCHS, lr=0.1, generator=generator)
    accuracy = problem.task.evaluate(problem.model)["accuracy"]
    context = TrialContext(
        config, problem.task, problem.model.eval(), problem.plan, accuracy, None
    )
    drops = tuple(problem.blocks[:count] for count in range(len(problem.blocks) + 1))
    return context, Space(config.space, problem.plan, drops)


def _draw(space: Space, seed: int) -> list[Candidate]:
    """A random candidate of each criterion."""
    variation = Variation(space, np.random.default_rng(seed))
    found: dict[str, Candidate] = {}
    while len(found) < len(space.criteria):
        candidate = space.candidate(variation.random())
        if candidate.criterion is not None:
            found.setdefault(candidate.criterion, candidate)
    return [found[name] for name in space.criteria]


def _fill_scores(context: TrialContext) -> dict[str, float]:
    """Scores each criterion once, as the first trial that asks for it does; seconds."""
    seconds = {}
    for name in context.config.space.criterion_names:
        start = time.perf_counter()
        make_recipe(Candidate(name, select="cumulative", k=0.5), context, 0)
        seconds[name] = time.perf_counter() - start
    return seconds


# --- plain and ours --------------------------------------------------------------------------


def _with_epochs(context: TrialContext, epochs: int) -> TrialContext:
    data = context.config.model_dump(mode="json")
    config = SearchConfig.model_validate(data | {"recover": data["recover"] | {"epochs": epochs}})
    return dataclasses.replace(context, config=config)


def _ours(candidate: Candidate, context: TrialContext, seed: int) -> tuple[TrialOutcome, float]:
    spec = TrialSpec("t00000", candidate, with_provenance(candidate, {}), seed)
    start = time.perf_counter()
    outcome = run_trial(spec, context)
    seconds = time.perf_counter() - start
    if outcome.result.status != TrialStatus.COMPLETED:
        raise RuntimeError(f"the trial failed: {outcome.result.message}")
    return outcome, seconds


def _plain(
    candidate: Candidate, context: TrialContext, dense: nn.Module, seed: int, epochs: int
) -> tuple[PlainOutcome, float]:
    config = _with_epochs(context, epochs).config
    layers = dict.fromkeys(context.plan.layers, 0)
    start = time.perf_counter()
    outcome = plain_trial(dense, context.task, candidate, config.recover, layers=layers, seed=seed)
    return outcome, time.perf_counter() - start


def _equal(candidate: Candidate, context: TrialContext, dense: nn.Module, seed: int) -> bool:
    """Whether both give the same in the same memory layout: channels, weights' effect, size."""
    ours, _ = _ours(
        candidate, _with_epochs(dataclasses.replace(context, dense=dense, scores={}), 1), seed
    )
    plain, _ = _plain(candidate, context, dense, seed, 1)
    row = ours.result
    assert ours.recipe is not None
    return (
        dict(ours.recipe.kept) == plain.kept
        and row.accuracy_before_finetune == plain.accuracy_before
        and row.accuracy == plain.accuracy
        and row.num_params == plain.num_params
    )


def _time(candidate: Candidate, context: TrialContext, dense: nn.Module, seed: int) -> _Pair:
    plain_s, ours_s = [], []
    for epochs in (0, 1):
        plain, seconds = _plain(candidate, context, dense, seed, epochs)
        plain_s.append(seconds)
        ours, seconds = _ours(candidate, _with_epochs(context, epochs), seed)
        ours_s.append(seconds)
    row = ours.result
    assert ours.recipe is not None and row.accuracy is not None
    assert row.accuracy_before_finetune is not None and candidate.criterion is not None
    return _Pair(
        candidate.criterion,
        (plain_s[0], plain_s[1]),
        (ours_s[0], ours_s[1]),
        dict(ours.recipe.kept) == plain.kept,
        row.accuracy_before_finetune - plain.accuracy_before,
        row.accuracy - plain.accuracy,
    )


def _ratios(
    pairs: Sequence[Sequence[_Pair]], score_s: Mapping[str, float], epochs: int
) -> dict[str, Any]:
    plain = [statistics.fmean(pair.plain[epochs] for pair in row) for row in pairs]
    ours = [statistics.fmean(pair.ours[epochs] for pair in row) for row in pairs]
    once = sum(score_s.values()) / A_RUN
    return {
        "epochs": epochs,
        "plain_s": statistics.median(plain),
        "ours_s": statistics.median(ours),
        "ratio": [a / b for a, b in zip(plain, ours, strict=True)],
        "ratio_with_scores": [a / (b + once) for a, b in zip(plain, ours, strict=True)],
    }


# --- the profile -----------------------------------------------------------------------------


def _profile(context: TrialContext, candidate: Candidate, times: int = 5) -> list[dict[str, Any]]:
    """Seconds of each step of one trial: the median over some repetitions, with their range."""
    task, recover = context.task, context.config.recover
    generator = torch.Generator().manual_seed(0)
    recipe, _ = make_recipe(candidate, context, 0)
    model = prune(context.dense, context.plan, recipe)
    image = task.example_input(context.config.latency.batch_size)

    def tune() -> None:
        finetune(model, task, epochs=1, lr=recover.lr, generator=generator)

    steps: list[tuple[str, Callable[[], Any], bool]] = [
        ("choose channels", lambda: make_recipe(candidate, context, 0), False),
        ("copy and prune", lambda: prune(context.dense, context.plan, recipe), False),
        (
            "batch norms",
            lambda: recalibrate_batch_norm(model, task, generator=generator),
            False,
        ),
        ("evaluate", lambda: task.evaluate(model, "val"), False),
        ("MACs", lambda: count_macs(model, image), False),
        ("memory", lambda: peak_memory_mib(model, image), False),
        ("copy of the weights", lambda: copy_state(model), False),
        ("fine-tune one epoch", tune, True),
        ("evaluate after it", lambda: task.evaluate(model, "val"), True),
    ]
    rows = []
    for name, step, tuning in steps:
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        rows.append(
            {
                "step": name,
                "seconds": statistics.median(seconds),
                "low": min(seconds),
                "high": max(seconds),
                "tuning": tuning,
            }
        )
    return rows
