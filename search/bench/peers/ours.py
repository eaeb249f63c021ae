"""This project's search under the same budget: its ledger becomes the log."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ....methods.surgery import PruningPlan, Recipe, prune
from ...records import TrialResult, TrialStatus
from ...runs import CONFIG, Run
from ...runs import run as run_search
from ...setup import find_groups
from .log import Architecture, Entry, Log
from .problem import PeerProblem

SEARCH = "search"


def run(problem: PeerProblem, log: Log, *, seconds: float) -> None:
    """Searches until the time is over, then writes the log.

    Args:
        problem: What is pruned.
        log: Where candidates go.
        seconds: The budget, counted from the start of the process.
    """
    config = problem.config
    left = max(1.0, seconds - log.seconds())
    limited = config.search.model_copy(update={"time_limit_s": left})
    folder = log.folder / SEARCH
    with _interrupted_after(left):
        run_search(config.model_copy(update={"search": limited}), out=folder)
    if not (folder / CONFIG).exists():
        return  # the time was over before the search had begun
    plan = find_groups(config, problem.dense, problem.task.example_input(2))
    started = time.time() - log.seconds()
    for result in Run(folder).results():
        if result.status is TrialStatus.COMPLETED:
            log.add(entry(result, problem, plan, started))


def entry(result: TrialResult, problem: PeerProblem, plan: PruningPlan, started: float) -> Entry:
    """A row of the ledger as a candidate of the log."""
    assert result.accuracy is not None and result.finished_at is not None
    assert result.macs is not None and result.num_params is not None
    model = prune(problem.dense, plan, _like(result, plan))
    return Entry(
        label=result.trial_id,
        seconds=result.finished_at - started,
        accuracy=result.accuracy,
        macs=result.macs,
        num_params=result.num_params,
        architecture=Architecture.of(problem.dense, model),
    )


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """As if the user stopped the search then: `time_limit_s` lets the last trials end."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except KeyboardInterrupt:
        pass  # what was finished is in the ledger
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _like(result: TrialResult, plan: PruningPlan) -> Recipe:
    """A recipe of the row's widths; which channels it keeps says nothing."""
    kept = {}
    for group in plan.alive(result.dropped_blocks):
        width = next(result.widths[n] for n in group.layers if n in result.widths)
        size, keep = group.num_channels // group.parts, width // group.parts
        kept[group.name] = tuple(p * size + i for p in range(group.parts) for i in range(keep))
    return Recipe(tuple(result.dropped_blocks), kept)
