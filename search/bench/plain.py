"""A trial as its steps are written with torch-pruning alone: nothing is kept from trial to trial.

It is what `bench trial` compares a trial with. The steps, their order and their numbers are a
trial's own: score, build the dependency graph, drop blocks, prune, re-estimate batch norms,
evaluate, count, fine-tune, evaluate. Scores come from the criterion's own code, which costs one
pass over the images; everything else is plain torch and torch-pruning.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from ...methods.criteria import score_channels
from ...methods.select import SELECTION_RULES
from ...methods.tasks import Task
from ..config import RecoverConfig
from ..records import Candidate

RECALIBRATION_IMAGES = 512


@dataclass
class PlainOutcome:
    """What came out, and the seconds of each step in order."""

    kept: dict[str, tuple[int, ...]]
    accuracy_before: float = 0.0
    accuracy: float = 0.0
    num_params: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def plain_trial(
    dense: nn.Module,
    task: Task,
    candidate: Candidate,
    recover: RecoverConfig,
    *,
    layers: Mapping[str, int],
    seed: int,
) -> PlainOutcome:
    """Runs one trial without anything from another one.

    Args:
        dense: A residual network whose last layer is linear; left as it was.
        task: Data and loss.
        candidate: Criterion, blocks to drop, and the rule `ratio` or `cumulative`.
        recover: Epochs, rate, momentum and weight decay of fine-tuning.
        layers: The layers to score, by name.
        seed: Draws the images of recovery.
    """
    outcome = PlainOutcome({})
    clock = _Clock(outcome.seconds)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    assert candidate.criterion is not None
    scores = score_channels(candidate.criterion, dense, task, list(layers), seed=0)
    clock("score")
    model = copy.deepcopy(dense)
    for name in candidate.dropped_blocks:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Identity())
    outcome.kept = _prune(model, task.example_input(1), candidate, scores)
    clock("graph and pruning")
    _recalibrate(model, task, generator)
    clock("batch norms")
    outcome.accuracy_before = outcome.accuracy = _evaluate(model, task)
    clock("evaluation")
    _, outcome.num_params = tp.utils.count_ops_and_params(model, task.example_input(1))
    clock("MACs and parameters")
    if recover.epochs > 0:
        _finetune(model, task, generator, recover)
        clock("fine-tuning")
        outcome.accuracy = _evaluate(model, task)
        clock("evaluation after it")
    return outcome


class _Clock:
    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, time.perf_counter()

    def __call__(self, step: str) -> None:
        now = time.perf_counter()
        self._seconds[step] = now - self._last
        self._last = now


def _prune(
    model: nn.Module, image: Tensor, candidate: Candidate, scores: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Removes the channels of each group that the candidate's rule does not keep."""
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=image)
    names = {module: name for name, module in model.named_modules()}
    places = {name: place for place, name in enumerate(names.values())}
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    kept: dict[str, tuple[int, ...]] = {}
    groups = list(graph.get_all_groups(ignored_layers=last, root_module_types=[nn.Conv2d]))
    for group in groups:
        makers = {
            names[dep.target.module]: scores[names[dep.target.module]].double()
            for dep, _ in group
            if isinstance(dep.target.module, nn.Conv2d)
            and graph.is_out_channel_pruning_fn(dep.handler)
        }
        mean = torch.stack(sorted_values(makers, places)).mean(0)
        name = min(makers, key=lambda one: places[one])
        rule = candidate.select or "ratio"
        share = candidate.k if rule == "cumulative" else dict(candidate.keep)[name]
        stays = SELECTION_RULES[rule](mean, share).tolist()
        kept[name] = tuple(stays)
        gone = sorted(set(range(len(mean))) - set(stays))
        if gone:
            root = model.get_submodule(name)
            graph.get_pruning_group(root, tp.prune_conv_out_channels, idxs=gone).prune()
    return kept


def sorted_values(makers: Mapping[str, Tensor], places: Mapping[str, int]) -> list[Tensor]:
    """In module order, so that sums of floats are alike."""
    return [makers[name] for name in sorted(makers, key=lambda one: places[one])]


def _recalibrate(model: nn.Module, task: Task, generator: torch.Generator) -> None:
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    whole = min(RECALIBRATION_IMAGES, task.num_train) // task.batch_size * task.batch_size
    model.train()
    with torch.no_grad():
        for images, _ in task.train_batches(generator, max_images=whole, augment=False):
            model(images)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


def _evaluate(model: nn.Module, task: Task) -> float:
    model.eval()
    correct = total = 0
    with torch.no_grad():
        for images, labels in task.batches("val"):
            correct += int((model(images).argmax(1) == labels).sum())
            total += len(labels)
    return correct / total


def _finetune(
    model: nn.Module, task: Task, generator: torch.Generator, recover: RecoverConfig
) -> None:
    steps = math.ceil(task.num_train / task.batch_size) * int(recover.epochs)
    warmup = max(1, int(0.1 * steps))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recover.lr,
        momentum=recover.momentum,
        weight_decay=recover.weight_decay,
        nesterov=True,
    )
    schedule: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for _ in range(int(recover.epochs)):
        for images, labels in task.train_batches(generator):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
