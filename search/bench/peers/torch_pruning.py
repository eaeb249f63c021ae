"""A Torch-Pruning script as its users write it (Fang et al. 2023, arXiv:2301.12900).

One shot at one ratio, then recovery; in turn by each importance and scope; again for the next
ratio of a ladder.
"""

from __future__ import annotations

import copy
import itertools

import torch
import torch_pruning as tp
from torch import nn

from .ladder import ladder
from .log import Log
from .problem import PeerProblem

RATIOS = (0.05, 0.9)  # the fractions of channels removed


def run(
    problem: PeerProblem,
    log: Log,
    *,
    ways: str = "l1 uniform, l1 global, taylor uniform, taylor global",
    worker: int = 0,
    workers: int = 1,
    limit: int | None = None,
) -> None:
    """Prunes at ratio after ratio, each ratio in each way, until it is stopped.

    Args:
        problem: What is pruned.
        log: Where candidates go.
        ways: Importances and scopes: `l1` or `taylor`, and `uniform` (each layer alike) or
            `global` (one threshold).
        worker: Which of the workers this is.
        workers: How many share the candidates.
        limit: How many candidates; None for all that fit in the time.
    """
    torch.set_num_threads(problem.threads)
    pairs = [way.split() for way in ways.split(", ")]
    every = (
        (importance, scope, ratio) for ratio in ladder(*RATIOS) for importance, scope in pairs
    )
    mine = itertools.islice(enumerate(every), worker, None, workers)
    for number, (importance, scope, ratio) in itertools.islice(mine, limit):
        label = f"{number:04d}-{importance}-{scope}-{ratio:.4f}"
        try:
            model = prune(problem, importance, scope, ratio)
            accuracy = problem.recover(model, number)
        except (ValueError, RuntimeError, FloatingPointError, ZeroDivisionError) as error:
            log.failed(label, error)
            continue
        log.finished(label, model, accuracy)


def prune(problem: PeerProblem, importance: str, scope: str, ratio: float) -> nn.Module:
    """A pruned copy of the dense model."""
    task = problem.task
    model = copy.deepcopy(problem.dense)
    last = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == task.num_classes
    ]
    round_to = problem.config.space.keep.round_to
    pruner = tp.pruner.BasePruner(
        model,
        task.example_input(),
        importance=IMPORTANCES[importance](),
        global_pruning=scope == "global",
        pruning_ratio=ratio,
        ignored_layers=last,
        round_to=None if round_to == 1 else round_to,
    )
    if importance == "taylor":
        model.zero_grad()
        for images, target in task.calibration_batches():
            task.loss(model(images), target).backward()  # type: ignore[no-untyped-call]
    pruner.step()
    model.zero_grad()
    return model


IMPORTANCES = {
    "l1": lambda: tp.importance.MagnitudeImportance(p=1),
    "taylor": lambda: tp.importance.TaylorImportance(),
}
