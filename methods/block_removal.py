"""Ranks the blocks of a model by what removing them costs.

Direct block removal: a block is as important as the accuracy that is lost without it. Accuracy
and loss are measured on the task's calibration split, which is part of the training data.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from .block_evaluation import BlockStep, Evaluator, RankingTask
from .block_orders import (
    Candidates,
    Fresh,
    Recovered,
    Score,
    attribution,
    greedy,
    oneshot,
    optimum,
    sr_init,
)
from .names import unknown_name
from .trace import eval_mode

__all__ = ["BlockRanking", "BlockStep", "RankingTask", "exhaustive", "rank_blocks"]

Order = Literal[
    "greedy", "oneshot", "exhaustive", "sequential", "random", "sr_init", "attribution"
]
FinetuneFrom = Literal["original", "cumulative"]
MAX_EXHAUSTIVE = 12  # blocks: 4,096 subsets
MEASURED_ORDERS = ("greedy", "oneshot", "exhaustive")


@dataclass(frozen=True)
class BlockRanking:
    """The order in which to remove blocks.

    Attributes:
        order: All blocks, the one to remove first in front.
        path: What was measured along the order. Greedy: the model after each removal; oneshot:
            the model without that one block; sr_init: the model with that one block
            re-initialised, mean of all draws; exhaustive: the best subset of each size;
            sequential, random and attribution: nothing.
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
    score_recalibrate_bn: bool = False,
    recalibration_images: int = 512,
    score_finetune_epochs: float = 0.0,
    finetune_from: FinetuneFrom = "original",
    finetune_lr: float = 1e-3,
    augment: bool = True,
    sr_samples: int = 1,
    fresh: Fresh | None = None,
) -> BlockRanking:
    """Orders blocks by how little the model suffers without them.

    greedy: remove the block whose removal leaves the best score, measure the rest again, repeat.
    oneshot: measure each block alone, once. exhaustive: the best of all subsets of each size.
    sequential: from the model's end. random: by `seed`. sr_init: give one block at a time the
    state of a newly initialised one; the smallest drop goes first (SR-init, arXiv:2303.07677).
    attribution: least `|gradient x activation|` first (see `layer_attribution`).
    Of equal scores the block nearer to the model's end goes first.

    Args:
        model: Left as it was. Run in eval mode.
        task: Supplies the calibration split; for fine-tuning the training batches too.
        blocks: Names that `removable_blocks` returns.
        order: How they are ordered.
        score: `accuracy` (high is good) or `loss` (low is good).
        seed: Of all that is random: the random order, sr_init, attribution, fine-tuning.
        max_drop: Greedy stops measuring after this many removals; the blocks left follow in the
            order of the last measurement.
        suffix_only: Run only what follows the removed block. The numbers are the same to the last
            digit; a model that does not allow it is run whole, and so is a fine-tuned one.
        score_recalibrate_bn: Greedy, oneshot and exhaustive re-estimate the batch-norm statistics
            of a copy of the model before they measure a removal: what a search does after it.
        recalibration_images: Training images for that.
        score_finetune_epochs: Likewise, fine-tune it for so long; a fraction trains on that share
            of an epoch.
        finetune_from: Greedy fine-tunes each removal from the model's `original` weights, or from
            those that the removal before it ended with (`cumulative`).
        finetune_lr: Peak learning rate of that.
        augment: Whether its images are augmented as suits the data set.
        sr_samples: sr_init takes the mean over so many draws.
        fresh: Returns a newly initialised model like `model`, for sr_init. By default every
            module's `reset_parameters` draws a block anew.

    Returns:
        The ranking.

    Raises:
        ValueError: If a name is unknown, a number is out of range, or a block is not called once
            with one tensor; for sr_init, if a block cannot be drawn anew.
        FloatingPointError: If a loss is no longer finite in fine-tuning.
    """
    _check_name("order", order, get_args(Order))
    _check_name("score", score, get_args(Score))
    _check_name("finetune_from", finetune_from, get_args(FinetuneFrom))
    _check_numbers(max_drop, score_finetune_epochs, sr_samples)
    if order not in MEASURED_ORDERS and (score_finetune_epochs > 0 or score_recalibrate_bn):
        raise ValueError(
            f"`order` (={order}) must be one of {', '.join(MEASURED_ORDERS)}: no other measures "
            "removals, so nothing can recover before. Change it, or set score_finetune_epochs: 0 "
            "and score_recalibrate_bn: false."
        )
    started = time.perf_counter()
    with eval_mode(model):
        evaluator = Evaluator(model, task, blocks, suffix_only)
        candidates: Candidates = evaluator
        if score_finetune_epochs > 0 or score_recalibrate_bn:
            evaluator.suffix_only = False
            candidates = Recovered(
                evaluator,
                model,
                task,
                recalibration_images=recalibration_images if score_recalibrate_bn else 0,
                epochs=score_finetune_epochs,
                lr=finetune_lr,
                augment=augment,
                cumulative=finetune_from == "cumulative",
                seed=seed,
            )
        path: list[BlockStep] = []
        names = list(reversed(evaluator.blocks))
        if order == "random":
            random.Random(seed).shuffle(names)
        elif order == "oneshot":
            names, path = oneshot(candidates, score)
        elif order == "exhaustive":
            _check_exhaustive(evaluator.blocks)
            names, path = optimum(candidates, score)
        elif order == "greedy":
            names, path = greedy(candidates, score, max_drop)
        elif order == "sr_init":
            names, path = sr_init(
                evaluator, model, score, seed=seed, samples=sr_samples, fresh=fresh
            )
        elif order == "attribution":
            names, path = attribution(evaluator, model, task, seed=seed)
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
        steps = Evaluator(model, task, blocks, suffix_only).every_subset()
    return {step.removed: step.accuracy for step in steps}


def _check_exhaustive(blocks: Sequence[str]) -> None:
    if len(blocks) > MAX_EXHAUSTIVE:
        raise ValueError(
            f"`blocks` (={len(blocks)} names) must hold at most {MAX_EXHAUSTIVE}: every block "
            "doubles the number of subsets. Name fewer, or use another order."
        )


def _check_numbers(max_drop: int | None, epochs: float, sr_samples: int) -> None:
    if max_drop is not None and max_drop < 0:
        raise ValueError(
            f"`max_drop` (={max_drop}) must be at least 0: it counts removals. Leave it out to "
            "rank all blocks."
        )
    if not (epochs >= 0 and math.isfinite(epochs)):
        raise ValueError(
            f"`score_finetune_epochs` (={epochs}) must be a finite number from 0 up: it is how "
            "long each candidate is trained. Use 0 to measure without training."
        )
    if sr_samples < 1:
        raise ValueError(
            f"`sr_samples` (={sr_samples}) must be at least 1: it counts draws. Use 1."
        )


def _check_name(field: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(unknown_name(field, name, known))
