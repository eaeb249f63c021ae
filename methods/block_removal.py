"""Ranks the blocks of a model by what removing them costs, without training.

Direct block removal: a block is as important as the accuracy that is lost without it. Accuracy
and loss are measured on the task's calibration split, which is part of the training data.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from .names import unknown_name
from .replay import Outputs, Replay
from .trace import eval_mode

Order = Literal["greedy", "oneshot", "exhaustive", "sequential", "random"]
Score = Literal["accuracy", "loss"]
MAX_EXHAUSTIVE = 12  # blocks: 4,096 subsets


class RankingTask(Protocol):
    """What block removal needs of a task."""

    def calibration_batches(self) -> list[tuple[Tensor, Tensor]]:
        """Fixed batches of images [B, C, H, W] and labels [B], on the model's device."""

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean loss of a batch, a scalar."""


@dataclass(frozen=True)
class BlockStep:
    """The model without some blocks, measured on the calibration split.

    Attributes:
        removed: The blocks left out.
        accuracy: Fraction of the images, 0..1.
        loss: Mean over the images.
    """

    removed: tuple[str, ...]
    accuracy: float
    loss: float


@dataclass(frozen=True)
class BlockRanking:
    """The order in which to remove blocks.

    Attributes:
        order: All blocks, the one to remove first in front.
        path: What was measured along the order. Greedy: the model after each removal; oneshot:
            the model without that one block; exhaustive: the best subset of each size;
            sequential and random: nothing.
        method: Which order it is.
        evaluations: How many models were evaluated on the whole calibration split.
        seconds: Wall time.
        suffix_only: Whether only the part of the model behind each removed block was run.
    """

    order: tuple[str, ...]
    path: tuple[BlockStep, ...]
    method: str
    evaluations: int
    seconds: float
    suffix_only: bool

    @property
    def drops(self) -> tuple[tuple[str, ...], ...]:
        """The blocks to remove if 0, 1, 2, ... are to go."""
        if self.method == "exhaustive":
            return ((), *(step.removed for step in self.path))
        return tuple(self.order[:count] for count in range(len(self.order) + 1))


def rank_blocks(
    model: nn.Module,
    task: RankingTask,
    blocks: Sequence[str],
    *,
    order: Order = "greedy",
    score: Score = "accuracy",
    seed: int = 0,
    max_drop: int | None = None,
    suffix_only: bool = True,
) -> BlockRanking:
    """Orders blocks by how little the model suffers without them.

    greedy: remove the block whose removal leaves the best score, measure the rest again, repeat.
    oneshot: measure each block alone, once. exhaustive: the best of all subsets of each size.
    sequential: from the model's end. random: by `seed`.
    Of equal scores the block nearer to the model's end goes first.

    Args:
        model: Left as it was. Run in eval mode.
        task: Supplies the calibration split.
        blocks: Names that `removable_blocks` returns.
        order: How they are ordered.
        score: `accuracy` (high is good) or `loss` (low is good).
        seed: Of the random order.
        max_drop: Greedy stops measuring after this many removals; the blocks left follow in the
            order of the last measurement.
        suffix_only: Run only what follows the removed block. The numbers are the same to the last
            digit; a model that does not allow it is run whole.

    Returns:
        The ranking.

    Raises:
        ValueError: If a name is unknown, or a block is not called once with one tensor.
    """
    _check_name("order", order, get_args(Order))
    _check_name("score", score, get_args(Score))
    if max_drop is not None and max_drop < 0:
        raise ValueError(
            f"`max_drop` (={max_drop}) must be at least 0: it counts removals. Leave it out to "
            "rank all blocks."
        )
    started = time.perf_counter()
    with eval_mode(model):
        evaluator = _Evaluator(model, task, blocks, suffix_only)
        path: list[BlockStep] = []
        names = list(reversed(evaluator.blocks))
        if order == "random":
            random.Random(seed).shuffle(names)
        elif order == "oneshot":
            path = _sorted(evaluator.without_each((), evaluator.blocks), score)
            names = [step.removed[-1] for step in path]
        elif order == "exhaustive":
            names, path = _optimum(evaluator, score)
        elif order == "greedy":
            names, path = _greedy(evaluator, score, max_drop)
    return BlockRanking(
        order=tuple(names),
        path=tuple(path),
        method=order,
        evaluations=evaluator.evaluations,
        seconds=time.perf_counter() - started,
        suffix_only=evaluator.suffix_only,
    )


def exhaustive(
    model: nn.Module, task: RankingTask, blocks: Sequence[str], *, suffix_only: bool = True
) -> dict[tuple[str, ...], float]:
    """Accuracy of the model without each subset of blocks, the empty one included.

    Subsets that agree up to a block share what runs before it.

    Args:
        model: Left as it was. Run in eval mode.
        task: Supplies the calibration split.
        blocks: Names that `removable_blocks` returns, at most `MAX_EXHAUSTIVE`.
        suffix_only: As for `rank_blocks`.

    Returns:
        Removed blocks, in the order of their calls -> accuracy on the calibration split, 0..1.

    Raises:
        ValueError: If there are too many blocks, or as for `rank_blocks`.
    """
    _check_exhaustive(blocks)
    with eval_mode(model):
        steps = _Evaluator(model, task, blocks, suffix_only).every_subset()
    return {step.removed: step.accuracy for step in steps}


class _Evaluator:
    """Measures models without blocks, batch by batch so that one batch's activations are kept."""

    def __init__(
        self, model: nn.Module, task: RankingTask, blocks: Sequence[str], suffix_only: bool
    ) -> None:
        batches = task.calibration_batches()
        self._replay = Replay(model, blocks, batches[0][0][:2])
        self._loss = task.loss
        self._batches = [
            part
            for images, labels in batches
            for part in zip(
                torch.split(images, self._replay.max_images),
                torch.split(labels, self._replay.max_images),
                strict=True,
            )
        ]
        self.blocks = self._replay.blocks
        self.suffix_only = suffix_only and self._replay.exact
        self.evaluations = 0

    def without_each(self, removed: tuple[str, ...], blocks: Sequence[str]) -> list[BlockStep]:
        """The model without `removed` and one more of `blocks`, which come in forward order."""

        def logits(images: Tensor) -> Iterator[tuple[tuple[str, ...], Tensor]]:
            sets = [(*removed, block) for block in blocks]
            if not (self.suffix_only and sets):
                yield from ((names, self._replay.run(images, names)) for names in sets)
                return
            # Up to the last block, the model without it is what the others start from.
            *earlier, last = sets
            result, outputs = self._replay.record(images, last)
            for names in earlier:
                yield names, self._replay.run(images, names, start=names[-1], outputs=outputs)
            yield last, result

        return self._measure(logits)

    def every_subset(self) -> list[BlockStep]:
        """The model without each subset of the blocks."""

        def visit(
            images: Tensor, removed: tuple[str, ...], first: int, outputs: Outputs | None
        ) -> Iterator[tuple[tuple[str, ...], Tensor]]:
            if self.suffix_only:
                start = removed[-1] if removed else None
                result, outputs = self._replay.record(
                    images, removed, start=start, outputs=outputs
                )
            else:
                result = self._replay.run(images, removed)
            yield removed, result
            for index in range(first, len(self.blocks)):
                yield from visit(images, (*removed, self.blocks[index]), index + 1, outputs)

        return self._measure(lambda images: visit(images, (), 0, None))

    def _measure(
        self, logits: Callable[[Tensor], Iterator[tuple[tuple[str, ...], Tensor]]]
    ) -> list[BlockStep]:
        """Accuracy and loss over all batches, for each set of blocks that `logits` yields."""
        totals: dict[tuple[str, ...], Tensor] = {}
        num_images = 0
        for images, labels in self._batches:
            num_images += len(labels)
            for removed, output in logits(images):
                correct = (output.argmax(1) == labels).sum()
                loss = self._loss(output, labels) * len(labels)
                sums = torch.stack([correct.double(), loss.double()])
                totals[removed] = totals[removed] + sums if removed in totals else sums
        self.evaluations += len(totals)
        means = {removed: (sums / num_images).tolist() for removed, sums in totals.items()}
        return [BlockStep(removed, *mean) for removed, mean in means.items()]


def _greedy(
    evaluator: _Evaluator, score: Score, max_drop: int | None
) -> tuple[list[str], list[BlockStep]]:
    left = list(evaluator.blocks)
    path: list[BlockStep] = []
    steps = len(left) if max_drop is None else min(max_drop, len(left))
    rest = list(reversed(left))
    for _ in range(steps):
        removed = path[-1].removed if path else ()
        ranked = _sorted(evaluator.without_each(removed, left), score)
        path.append(ranked[0])
        left.remove(ranked[0].removed[-1])
        rest = [step.removed[-1] for step in ranked[1:]]
    return [*(path[-1].removed if path else ()), *rest], path


def _optimum(evaluator: _Evaluator, score: Score) -> tuple[list[str], list[BlockStep]]:
    """Single removals in order, and the best subset of each size: brute force."""
    _check_exhaustive(evaluator.blocks)
    steps = evaluator.every_subset()
    sizes = range(1, len(evaluator.blocks) + 1)
    ranked = [_sorted([s for s in steps if len(s.removed) == size], score) for size in sizes]
    singles = [step.removed[0] for step in ranked[0]] if ranked else []
    return singles, [best[0] for best in ranked]


def _check_exhaustive(blocks: Sequence[str]) -> None:
    if len(blocks) > MAX_EXHAUSTIVE:
        raise ValueError(
            f"`blocks` (={len(blocks)} names) must hold at most {MAX_EXHAUSTIVE}: every block "
            "doubles the number of subsets. Name fewer, or use another order."
        )


def _sorted(steps: list[BlockStep], score: Score) -> list[BlockStep]:
    """Best first; of equal ones the later block, whose steps come last in `steps`, first."""

    def badness(step: BlockStep) -> float:
        value = -step.accuracy if score == "accuracy" else step.loss
        return math.inf if math.isnan(value) else value

    return sorted(reversed(steps), key=badness)


def _check_name(field: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(unknown_name(field, name, known))
