"""Direct block removal: rank blocks by what the model loses without them.

Wu et al., Block Pruning for Enhanced Efficiency in Convolutional Neural Networks, section III-C:
remove each remaining block in turn, measure the accuracy, remove the one that costs least. Scored
on the task's calibration split, which is training data.

Removing a block changes nothing before it. So for each batch one forward pass is kept, and each
candidate runs only from its own block on: every module that ends before the block begins is
replaced, for that one pass, by what it returned.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .blocks import trace_calls

Order = Literal["greedy", "oneshot", "sequential", "random"]
Score = Literal["accuracy", "loss"]
MAX_EXHAUSTIVE = 12


@dataclass(frozen=True)
class BlockStep:
    """The model without `removed`, on the calibration split."""

    removed: tuple[str, ...]
    accuracy: float
    loss: float


@dataclass(frozen=True)
class BlockRanking:
    """An order of removal.

    Attributes:
        order: Every block, the first to remove in front.
        path: What the model scores after each removal that was measured (greedy), or with each
            block alone removed, in `order` (one-shot); empty for orders that measure nothing.
        method: The order's name.
        evaluations: Models evaluated.
        seconds: Time taken.
    """

    order: tuple[str, ...]
    path: tuple[BlockStep, ...]
    method: str
    evaluations: int
    seconds: float


def rank_blocks(
    model: nn.Module,
    task: Any,
    blocks: Sequence[str],
    *,
    order: Order = "greedy",
    score: Score = "accuracy",
    seed: int = 0,
    max_drop: int | None = None,
    suffix_only: bool = True,
) -> BlockRanking:
    """Ranks `blocks` by direct removal.

    Of equally good removals the later block goes first (the paper's sequential baseline).

    Args:
        model: Left as it is.
        task: Supplies `calibration_batches()` and `loss`.
        blocks: Removable blocks in forward order.
        order: `greedy` looks again after each removal, `oneshot` looks once, `sequential` goes
            from the end, `random` is a seeded permutation.
        score: What a removal must not cost: `accuracy`, or `loss`.
        seed: Of the order `random`.
        max_drop: Greedy stops looking after so many removals; the rest keep their last ranking.
        suffix_only: False runs every candidate from the first layer; the results are the same.
    """
    start = time.perf_counter()
    if order == "sequential":
        return BlockRanking(tuple(reversed(blocks)), (), order, 0, 0.0)
    if order == "random":
        shuffled = random.Random(seed).sample(list(blocks), len(blocks))
        return BlockRanking(tuple(shuffled), (), order, 0, 0.0)
    evaluator = _Evaluator(model, task, suffix_only=suffix_only)
    rounds = 1 if order == "oneshot" else min(len(blocks), max_drop or len(blocks))
    removed: tuple[str, ...] = ()
    path: list[BlockStep] = []
    rest = list(blocks)
    for _ in range(rounds):
        steps = evaluator.evaluate([(*removed, block) for block in rest])
        steps.sort(key=lambda step: _rank(step, score, rest), reverse=True)
        if order == "oneshot":
            path, rest = steps, []
            removed = tuple(step.removed[-1] for step in steps)
        else:
            path.append(steps[0])
            removed = steps[0].removed
            rest = [block for block in rest if block not in removed]
            ranked = [step.removed[-1] for step in steps[1:]]
    if rest:
        removed += tuple(ranked)
    seconds = time.perf_counter() - start
    return BlockRanking(removed, tuple(path), order, evaluator.evaluations, seconds)


def exhaustive(
    model: nn.Module, task: Any, blocks: Sequence[str], *, suffix_only: bool = True
) -> dict[frozenset[str], BlockStep]:
    """Scores every subset of `blocks`, the empty one included: the optimum by brute force.

    Raises:
        ValueError: If there are more than 12 blocks, which would be over 4,096 models.
    """
    if len(blocks) > MAX_EXHAUSTIVE:
        raise ValueError(
            f"`blocks` (={len(blocks)} of them) must be at most {MAX_EXHAUSTIVE}: there are "
            f"{2 ** len(blocks)} subsets. Name fewer blocks or use the greedy order."
        )
    subsets = [
        subset
        for size in range(len(blocks) + 1)
        for subset in itertools.combinations(blocks, size)
    ]
    steps = _Evaluator(model, task, suffix_only=suffix_only).evaluate(subsets)
    return {frozenset(step.removed): step for step in steps}


def _rank(step: BlockStep, score: Score, blocks: Sequence[str]) -> tuple[float, float]:
    """Sorts the best removal last; a later block wins a tie."""
    quality = step.accuracy if score == "accuracy" else -step.loss
    return quality, blocks.index(step.removed[-1])


class _Evaluator:
    """Evaluates removals on the calibration batches, all candidates batch by batch."""

    def __init__(self, model: nn.Module, task: Any, *, suffix_only: bool) -> None:
        self._model = model
        self._task = task
        self._batches = task.calibration_batches()
        self._modules = dict(model.named_modules())
        calls = trace_calls(model, self._batches[0][0][:2])
        self._position = {name: index for index, name in enumerate(calls)}
        self._once = {name for name, call in calls.items() if call.count == 1}
        self._suffix_only = suffix_only
        self.evaluations = 0

    def evaluate(self, candidates: Sequence[tuple[str, ...]]) -> list[BlockStep]:
        """Accuracy and mean loss of the model without each candidate's blocks."""
        correct = [0] * len(candidates)
        losses = [0.0] * len(candidates)
        count = 0
        common = frozenset.intersection(*map(frozenset, candidates)) if candidates else frozenset()
        with _eval_mode(self._model), torch.inference_mode(), _bypassed(self._of(common)):
            for images, labels in self._batches:
                run = self._prefix(images, [c for c in candidates if set(c) - common], common)
                for index, candidate in enumerate(candidates):
                    logits = run(tuple(set(candidate) - common))
                    correct[index] += int((logits.argmax(1) == labels).sum())
                    losses[index] += float(self._task.loss(logits, labels)) * len(labels)
                count += len(labels)
        self.evaluations += len(candidates)
        return [
            BlockStep(candidate, correct[i] / count, losses[i] / count)
            for i, candidate in enumerate(candidates)
        ]

    def _prefix(
        self, images: Tensor, candidates: Iterable[tuple[str, ...]], common: frozenset[str]
    ) -> Callable[[tuple[str, ...]], Tensor]:
        """Runs the common model once and returns what runs a candidate from its first block on."""

        def full(removed: tuple[str, ...]) -> Tensor:
            with _bypassed(self._of(removed)):
                return _logits(self._model(images))

        if not self._suffix_only:
            return full
        starts = {self._first(set(candidate) - common) for candidate in candidates}
        memory = self._remember(images, {name for name in starts if name in self._once})

        def suffix(removed: tuple[str, ...]) -> Tensor:
            if not removed:
                return full(removed)
            first = self._first(removed)
            if first not in memory.inputs:
                return full(removed)
            with _bypassed(self._of(set(removed) - {first})), self._from(first, memory):
                return _logits(self._model(images))

        return suffix

    def _remember(self, images: Tensor, starts: set[str]) -> _Memory:
        """One forward pass that keeps the input of each start and what comes before it."""
        memory = _Memory({}, {})
        before = {name for start in starts for name in self._before(start)}
        with ExitStack() as stack:
            for name in starts:
                hook = self._modules[name].register_forward_pre_hook(memory.keep_input(name))
                stack.callback(hook.remove)
            for name in before - {n for n in before if self._in_sequential(n)}:
                hook = self._modules[name].register_forward_hook(memory.keep_output(name))
                stack.callback(hook.remove)
            self._model(images)
        return memory

    @contextmanager
    def _from(self, start: str, memory: _Memory) -> Iterator[None]:
        """Makes a forward pass begin at `start`: what is before it returns what it returned.

        A child of an `nn.Sequential` before the start need not return anything: its output goes
        only to the next child.
        """
        replaced: dict[nn.Module, Callable[..., Any]] = {}
        for name in self._before(start):
            if self._in_sequential(name):
                replaced[self._modules[name]] = _same
            else:
                replaced[self._modules[name]] = _returns(memory.outputs[name])
        replaced[self._modules[start]] = _returns(memory.inputs[start])
        with _forwards(replaced):
            yield

    def _before(self, start: str) -> list[str]:
        """The outermost modules that are called once and end before `start` begins."""
        found: list[str] = []
        ancestors = _ancestors(start)
        for name, position in self._position.items():
            if position >= self._position[start]:
                break
            if name in self._once and name not in ancestors and not _within(name, found):
                found.append(name)
        return found

    def _in_sequential(self, name: str) -> bool:
        return type(self._modules[name.rpartition(".")[0]]) is nn.Sequential

    def _first(self, blocks: Iterable[str]) -> str:
        return min(blocks, key=self._position.__getitem__)

    def _of(self, names: Iterable[str]) -> list[nn.Module]:
        return [self._modules[name] for name in names]


@dataclass(frozen=True)
class _Memory:
    """Inputs of blocks and outputs of the modules before them, for one batch."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]

    def keep_input(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.inputs[name] = _copy(args[0])

        return hook

    def keep_output(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.outputs[name] = _copy(output)

        return hook


def _copy(value: Any) -> Any:
    """A copy that an in-place operation further on cannot reach."""
    return value.clone() if isinstance(value, Tensor) else value


def _returns(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _copy(value)


def _same(x: Any) -> Any:
    return x


@contextmanager
def _bypassed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Makes the modules return their input."""
    with _forwards(dict.fromkeys(modules, _same)):
        yield


@contextmanager
def _forwards(replaced: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replaces the modules' forward functions; what was there before comes back."""
    before = {module: vars(module).get("forward") for module in replaced}
    for module, forward in replaced.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _logits(output: Any) -> Tensor:
    assert isinstance(output, Tensor)
    return output


def _ancestors(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def _within(name: str, outer: Iterable[str]) -> bool:
    return any(name.startswith(parent + ".") for parent in outer)
