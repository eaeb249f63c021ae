"""Measures models without some of their blocks on the calibration split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from .replay import Outputs, Replay
from .tasks.meter import Meter

State = dict[str, Tensor]


class RankingTask(Protocol):
    """What block removal needs of a task."""

    def calibration_batches(self) -> list[tuple[Tensor, Any]]:
        """Fixed batches of images [B, C, H, W] and targets, on the model's device."""

    def training_loss(self, model: nn.Module, images: Tensor, target: Any, /) -> Tensor:
        """Mean loss of a batch, a scalar; the model stays in its mode."""

    def meter(self) -> Meter:
        """A new meter of accuracy and loss."""


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


class Evaluator:
    """Measures models without blocks, batch by batch so that one batch's activations are kept.

    Args:
        model: In eval mode, with gradients off, as long as this object is used.
        task: Supplies the calibration split.
        blocks: Names of the blocks.
        suffix_only: Run only what follows a removed block, where that gives the same numbers.

    Attributes:
        blocks: In the order of their calls.
        suffix_only: Whether that is what happens.
        evaluations: How many models were evaluated on the whole calibration split.
    """

    def __init__(
        self, model: nn.Module, task: RankingTask, blocks: Sequence[str], suffix_only: bool
    ) -> None:
        batches = task.calibration_batches()
        self._replay = Replay(model, blocks, batches[0][0][:2])
        self._model = model
        self._meter = task.meter
        size = self._replay.max_images
        self._batches = [
            (images[start : start + size], targets[start : start + size])
            for images, targets in batches
            for start in range(0, len(images), size)
        ]
        self.blocks = self._replay.blocks
        self.suffix_only = suffix_only and self._replay.exact
        self.evaluations = 0

    def without_each(self, removed: tuple[str, ...], blocks: Sequence[str]) -> list[BlockStep]:
        """The model without `removed` and one more of `blocks`, which come in forward order."""

        def logits(images: Tensor) -> Iterator[tuple[tuple[str, ...], Any]]:
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
        """The model without each subset of the blocks, which must be few."""

        def visit(
            images: Tensor, removed: tuple[str, ...], first: int, outputs: Outputs | None
        ) -> Iterator[tuple[tuple[str, ...], Any]]:
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

    def with_states(self, states: Mapping[str, State]) -> list[BlockStep]:
        """The whole model with the state of one block replaced, for each of the blocks.

        Args:
            states: Block -> its other state.

        Returns:
            In forward order; `removed` names the block.
        """

        def logits(images: Tensor) -> Iterator[tuple[tuple[str, ...], Any]]:
            outputs = self._replay.record(images, ())[1] if self.suffix_only else None
            for name in self.blocks:
                start = name if self.suffix_only else None
                with _state_replaced(self._model.get_submodule(name), states[name]):
                    result = self._replay.run(images, (), start=start, outputs=outputs)
                yield (name,), result

        return self._measure(logits)

    def of_model(self, model: nn.Module, removed: tuple[str, ...]) -> BlockStep:
        """Another model, from which `removed` have been removed, run whole."""
        return self._measure(lambda images: iter([(removed, model(images.clone()))]))[0]

    def _measure(
        self, outputs: Callable[[Tensor], Iterator[tuple[tuple[str, ...], Any]]]
    ) -> list[BlockStep]:
        """Accuracy and loss over all batches, for each set of blocks that `outputs` yields."""
        meters: dict[tuple[str, ...], Meter] = {}
        for images, targets in self._batches:
            for removed, output in outputs(images):
                if removed not in meters:
                    meters[removed] = self._meter()
                meters[removed].update(output, targets)
        self.evaluations += len(meters)
        found = {removed: meter.compute() for removed, meter in meters.items()}
        return [BlockStep(removed, f["accuracy"], f["loss"]) for removed, f in found.items()]


@contextmanager
def _state_replaced(module: nn.Module, state: State) -> Iterator[None]:
    own = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    try:
        module.load_state_dict(state)
        yield
    finally:
        module.load_state_dict(own)
