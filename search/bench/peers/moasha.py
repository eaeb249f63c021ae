"""Syne Tune's MOASHA (Schmucker et al. 2021, arXiv:2106.12639) on our space, flattened.

The scheduler is Syne Tune's own object. It is asked and told in a loop over worker processes that
stay alive, in the place of its `LocalBackend`, which starts a Python process a trial.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from syne_tune.backend.trial_status import Trial
from syne_tune.config_space import choice, loguniform, randint, uniform
from syne_tune.optimizer.scheduler import SchedulerDecision
from syne_tune.optimizer.schedulers.multiobjective.moasha import MOASHA
from torch import nn

from ....methods.measure import Latency, paired_latency, reference_latency_ms
from ....methods.surgery import Recipe, layer_widths, prune
from ...context import TrialContext
from ...prune import make_recipe, start_of
from ...setup import find_groups, find_removable
from ...space import Params, Space
from .latencies import contiguous
from .log import Log
from .problem import PeerProblem

ERROR, LATENCY, LEVEL = "error", "latency_ms", "level"
PRUNED, RECOVERED = 1, 3  # what a trial has spent: ASHA's levels are powers of 3
FAILED = 1.0  # the error of a trial that came to nothing


def run(problem: PeerProblem, log: Log, *, limit: int | None = None) -> None:
    """Runs trials until it is stopped.

    Args:
        problem: What is pruned.
        log: Where candidates go.
        limit: How many trials; None for all that fit in the time.
    """
    connections = _start(problem, log)
    np.random.seed(problem.config.search.seed)  # what the scheduler draws from
    scheduler = MOASHA(
        _flatten(_space(problem)),
        metrics=[ERROR, LATENCY],
        time_attr=LEVEL,
        max_t=RECOVERED,
        grace_period=PRUNED,
        reduction_factor=RECOVERED / PRUNED,
        random_seed=problem.config.search.seed,
    )
    trials: dict[Connection, Trial] = {}
    asked = 0

    def next_trial(connection: Connection) -> None:
        nonlocal asked
        trials.pop(connection, None)
        if limit is not None and asked >= limit:
            connection.send(None)
            return
        suggestion = scheduler.suggest()
        assert suggestion is not None
        trial = Trial(asked, suggestion.config, datetime.now())
        asked += 1
        scheduler.on_trial_add(trial)
        trials[connection] = trial
        connection.send((trial.trial_id, trial.config))

    for connection in connections:
        next_trial(connection)
    while trials:
        for ready in wait(list(trials)):
            assert isinstance(ready, Connection)
            report = ready.recv()
            trial = trials[ready]
            if report[LEVEL] >= RECOVERED:
                scheduler.on_trial_complete(trial, report)
                next_trial(ready)
            elif scheduler.on_trial_result(trial, report) == SchedulerDecision.STOP:
                scheduler.on_trial_remove(trial)
                ready.send(False)
                next_trial(ready)
            else:
                ready.send(True)


# --- the space -------------------------------------------------------------------------------


def _space(problem: PeerProblem) -> Space:
    """Our space; blocks are in forward order, since ranking them is a method of ours."""
    config, example = problem.config, problem.task.example_input(2)
    blocks = find_removable(config, problem.dense, example)
    drops = tuple(blocks[:count] for count in range(len(blocks) + 1))
    return Space(config.space, find_groups(config, problem.dense, example), drops)


def _flatten(space: Space) -> dict[str, Any]:
    """Every dimension that any candidate has, as an independent one."""
    found: dict[str, Any] = {}
    pending: list[Params] = [{}]
    while pending:
        given = pending.pop()
        recorder = _Recorder(given)
        space.suggest(recorder)  # type: ignore[arg-type]  # it only asks for values
        found |= recorder.dimensions
        for name in CONDITIONS & recorder.choices.keys() - given.keys():
            pending += [given | {name: value} for value in recorder.choices[name]]
    return found


CONDITIONS = {"criterion", "select"}  # what other dimensions depend on


@dataclasses.dataclass
class _Recorder:
    """Stands for an Optuna trial: notes the dimensions that it is asked for."""

    given: Params
    dimensions: dict[str, Any] = dataclasses.field(default_factory=dict)
    choices: dict[str, Sequence[Any]] = dataclasses.field(default_factory=dict)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.dimensions[name], self.choices[name] = choice(list(choices)), choices
        return self.given.get(name, choices[0])

    def suggest_int(self, name: str, low: int, high: int, **_: Any) -> int:
        self.dimensions[name] = randint(low, high)
        return low

    def suggest_float(self, name: str, low: float, high: float, **options: Any) -> float:
        if options.get("step"):
            count = round((high - low) / options["step"]) + 1
            self.dimensions[name] = choice([float(v) for v in np.linspace(low, high, count)])
        else:
            self.dimensions[name] = (loguniform if options.get("log") else uniform)(low, high)
        return low


@dataclasses.dataclass(frozen=True)
class _Lookup:
    """Stands for an Optuna trial: answers with a flat configuration's values."""

    values: Mapping[str, Any]

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.values[name]

    def suggest_int(self, name: str, low: int, high: int, **_: Any) -> Any:
        return self.values[name]

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> Any:
        return self.values[name]


# --- the workers -----------------------------------------------------------------------------


def _start(problem: PeerProblem, log: Log) -> list[Connection]:
    """Worker processes; they end when this process does."""
    context = multiprocessing.get_context("spawn")
    connections = []
    started = time.time() - log.seconds()
    for _ in range(problem.workers):
        ours, theirs = context.Pipe()
        arguments = (theirs, problem.folder, log.folder, started)
        context.Process(target=_work, args=arguments, daemon=True).start()
        theirs.close()
        connections.append(ours)
    return connections


def _work(connection: Connection, problem_folder: Path, folder: Path, started: float) -> None:
    problem = PeerProblem(problem_folder)
    log = Log(folder, problem, started)
    torch.set_num_threads(problem.threads)
    space = _space(problem)
    context = TrialContext(
        config=problem.config,
        task=problem.task,
        dense=problem.dense,
        plan=space.plan,
        baseline_accuracy=problem.baseline["accuracy"],
        measure_latency=None,
    )
    probe = _Probe(problem)
    while (order := connection.recv()) is not None:
        number, values = order
        try:
            _trial(number, space.suggest(_Lookup(values)), space, context, probe, connection, log)  # type: ignore[arg-type]
        except (ValueError, RuntimeError, FloatingPointError) as error:
            log.failed(f"{number:04d}", error)
            connection.send({ERROR: FAILED, LATENCY: probe.reference_ms, LEVEL: RECOVERED})


def _trial(
    number: int,
    params: Params,
    space: Space,
    context: TrialContext,
    probe: _Probe,
    connection: Connection,
    log: Log,
) -> None:
    """The steps of our trials; after batch-norm recalibration the scheduler decides."""
    problem = probe.problem
    candidate = space.candidate(params)
    generator = problem.generator(number)
    start = start_of(candidate, context)
    recipe, _ = make_recipe(candidate, context, number, start)
    model = prune(start.model, context.plan, recipe)
    problem.recalibrate(model, generator)
    accuracy = problem.accuracy(model)
    latency_ms = probe.measure(model, recipe).latency_ms
    connection.send({ERROR: 1 - accuracy, LATENCY: latency_ms, LEVEL: PRUNED})
    if not connection.recv():
        return
    problem.finetune(model, generator)
    accuracy = problem.accuracy(model)
    log.finished(f"{number:04d}", model, accuracy)
    connection.send({ERROR: 1 - accuracy, LATENCY: latency_ms, LEVEL: RECOVERED})


class _Probe:
    """Latency in the worker itself, paired with the dense model's; known widths take no time."""

    def __init__(self, problem: PeerProblem) -> None:
        self.problem = problem
        settings = problem.config.latency
        self._device = torch.device(settings.device)
        self._dense = contiguous(problem.dense).to(self._device)
        self._example = problem.task.example_input(settings.batch_size).to(self._device)
        self._options = {"threads": settings.threads, "runs": settings.runs}
        self.reference_ms = reference_latency_ms(self._dense, self._example, **self._options)
        self._known: dict[str, Latency] = {}

    def measure(self, model: nn.Module, recipe: Recipe) -> Latency:
        key = repr((recipe.dropped_blocks, layer_widths(model)))
        if key not in self._known:
            self._known[key] = paired_latency(
                contiguous(model).to(self._device),
                self._dense,
                self._example,
                reference_ms=self.reference_ms,
                **self._options,
            )
        return self._known[key]
