"""Orders of removal: greedy, one-shot, optimum, by re-initialisation, by attribution."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Literal, Protocol

import torch
from torch import nn

from .block_evaluation import BlockStep, Evaluator, RankingTask, State
from .blocks import remove_blocks
from .finetune import finetune, recalibrate_batch_norm
from .layer_attribution import score_layers
from .seeding import seeded

Score = Literal["accuracy", "loss"]
Ranked = tuple[list[str], list[BlockStep]]  # the order, and what was measured along it
Fresh = Callable[[], nn.Module]


class Candidates(Protocol):
    """Measures what a model is worth without one block more."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """In the order of their calls."""

    def without_each(self, removed: tuple[str, ...], blocks: Sequence[str]) -> list[BlockStep]:
        """The model without `removed` and one more of `blocks`, which come in forward order."""

    def every_subset(self) -> list[BlockStep]:
        """The model without each subset of the blocks."""


def greedy(candidates: Candidates, score: Score, max_drop: int | None) -> Ranked:
    """Removes the block whose removal leaves the best score, measures the rest again, repeats."""
    left = list(candidates.blocks)
    path: list[BlockStep] = []
    steps = len(left) if max_drop is None else min(max_drop, len(left))
    rest = list(reversed(left))
    for _ in range(steps):
        removed = path[-1].removed if path else ()
        ranked = _sorted(candidates.without_each(removed, left), score)
        path.append(ranked[0])
        left.remove(ranked[0].removed[-1])
        rest = [step.removed[-1] for step in ranked[1:]]
    return [*(path[-1].removed if path else ()), *rest], path


def oneshot(candidates: Candidates, score: Score) -> Ranked:
    """Measures the model without each block alone."""
    return _singles(candidates.without_each((), candidates.blocks), score)


def optimum(candidates: Candidates, score: Score) -> Ranked:
    """Single removals in order, and the best subset of each size: brute force."""
    steps = candidates.every_subset()
    sizes = range(1, len(candidates.blocks) + 1)
    ranked = [_sorted([s for s in steps if len(s.removed) == size], score) for size in sizes]
    singles = [step.removed[0] for step in ranked[0]] if ranked else []
    return singles, [best[0] for best in ranked]


REDRAW = 1_000_003
"""Keeps the seeds of new weights apart from the seed that the model itself was drawn with."""


def sr_init(
    evaluator: Evaluator,
    model: nn.Module,
    score: Score,
    *,
    seed: int,
    samples: int,
    fresh: Fresh | None,
) -> Ranked:
    """Measures the model with one block re-initialised; the least damage goes first.

    The drop acc_0 - acc is smallest where the accuracy is highest. Tang et al. 2023 (SR-init),
    arXiv:2303.07677; here a block's whole state is replaced, batch norms included.
    """
    draws = []
    for sample in range(samples):
        with seeded(seed + REDRAW * (sample + 1)):
            states = _fresh_states(model, evaluator.blocks, fresh)
        draws.append(evaluator.with_states(states))
    return _singles([_mean(steps) for steps in zip(*draws, strict=True)], score)


def attribution(evaluator: Evaluator, model: nn.Module, task: RankingTask, *, seed: int) -> Ranked:
    """The block whose activations matter least to the loss goes first (see layer_attribution)."""
    generator = torch.Generator().manual_seed(seed)
    scores = score_layers(model, task, evaluator.blocks, generator=generator)
    return sorted(reversed(evaluator.blocks), key=scores.__getitem__), []


class Recovered:
    """Candidates that get some accuracy back before they are measured.

    Each is a copy of the model. All candidates for one removal see the same training batches.

    Args:
        evaluator: Measures them.
        model: The model with all its blocks; never changed.
        task: Gives the training batches and the loss.
        recalibration_images: Training images that batch-norm statistics are re-estimated on first;
            0 leaves them.
        epochs: Of the fine-tuning.
        lr: Its peak learning rate.
        augment: Whether its images are augmented as suits the data set.
        cumulative: A removal starts from the weights that the removal before it ended with, and
            not from the model's own.
        seed: Of the training batches, and of what the model itself draws.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        model: nn.Module,
        task: RankingTask,
        *,
        recalibration_images: int,
        epochs: float,
        lr: float,
        augment: bool,
        cumulative: bool,
        seed: int,
    ) -> None:
        self.blocks = evaluator.blocks
        self._evaluator = evaluator
        self._model = model
        self._task = task
        self._recalibration_images, self._augment = recalibration_images, augment
        self._epochs, self._lr, self._seed = epochs, lr, seed
        self._cumulative = cumulative
        self._last: dict[tuple[str, ...], nn.Module] = {}  # the candidates for the last removal

    def without_each(self, removed: tuple[str, ...], blocks: Sequence[str]) -> list[BlockStep]:
        """The recovered models without `removed` and one more of `blocks`."""
        start = self._last.pop(removed, None)
        self._last.clear()
        steps = []
        for block in blocks:
            if start is None:
                candidate = remove_blocks(copy.deepcopy(self._model), [*removed, block])
            else:
                candidate = remove_blocks(copy.deepcopy(start), [block])
            self._recover(candidate, self._seed + len(removed))
            steps.append(self._evaluator.of_model(candidate, (*removed, block)))
            if self._cumulative:
                self._last[steps[-1].removed] = candidate
        return steps

    def every_subset(self) -> list[BlockStep]:
        """The recovered model without each subset of the blocks."""
        steps = []
        for size in range(len(self.blocks) + 1):
            for removed in combinations(self.blocks, size):
                candidate = remove_blocks(copy.deepcopy(self._model), removed)
                self._recover(candidate, self._seed + max(0, size - 1))
                steps.append(self._evaluator.of_model(candidate, removed))
        return steps

    def _recover(self, model: nn.Module, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with seeded(seed), torch.enable_grad():  # dropout draws from the global generators
            if self._recalibration_images:
                recalibrate_batch_norm(
                    model,
                    self._task,
                    generator=generator,
                    num_images=self._recalibration_images,
                )
            finetune(
                model,
                self._task,
                epochs=self._epochs,
                lr=self._lr,
                generator=generator,
                augment=self._augment,
            )


def _fresh_states(
    model: nn.Module, blocks: Sequence[str], fresh: Fresh | None
) -> Mapping[str, State]:
    """The state of each block in a newly initialised model."""
    if fresh is not None:
        other = fresh()
        return {name: other.get_submodule(name).state_dict() for name in blocks}
    return {name: _reset(name, model.get_submodule(name)).state_dict() for name in blocks}


def _reset(name: str, block: nn.Module) -> nn.Module:
    """A copy, on the CPU so that every device gets the same numbers, with all state drawn anew."""
    block = copy.deepcopy(block).cpu()
    for key, module in block.named_modules():
        reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if reset is not None:
            reset()
        elif any(tensor.is_floating_point() for tensor in own):
            raise ValueError(
                f"`blocks` (={name}) must hold modules with a `reset_parameters` method: "
                f"{f'{name}.{key}'.rstrip('.')}, a {type(module).__name__}, has weights that "
                "cannot be drawn anew. Pass `fresh`, which makes a new model, or use another "
                "order."
            )
    return block


def _mean(steps: Sequence[BlockStep]) -> BlockStep:
    """Of the same block in several draws."""
    return BlockStep(
        steps[0].removed,
        accuracy=math.fsum(step.accuracy for step in steps) / len(steps),
        loss=math.fsum(step.loss for step in steps) / len(steps),
    )


def _singles(steps: list[BlockStep], score: Score) -> Ranked:
    path = _sorted(steps, score)
    return [step.removed[-1] for step in path], path


def _sorted(steps: list[BlockStep], score: Score) -> list[BlockStep]:
    """Best first; of equal ones the later block, whose steps come last in `steps`, first."""

    def badness(step: BlockStep) -> float:
        value = -step.accuracy if score == "accuracy" else step.loss
        return math.inf if math.isnan(value) else value

    return sorted(reversed(steps), key=badness)
