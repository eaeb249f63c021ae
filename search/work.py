"""A trial under way: its pruned model and how far its fine-tuning is; kept between two rungs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import nn

from ..methods.finetune import FinetuneOptions, Finetuning
from ..methods.shapes import copy_state, load_state
from ..methods.surgery import Recipe, prune
from .context import TrialContext


@dataclass
class Work:
    """What is needed to go on with a trial.

    Attributes:
        model: Pruned, its batch norms recalibrated.
        recipe: What was removed; None where no recipe says it (ablations).
        training: Its fine-tuning; None when there is none.
        fidelity: The rung that it has reached.
        reconstructed: Whether block reconstruction has trained it.
    """

    model: nn.Module
    recipe: Recipe | None
    training: Finetuning | None
    fidelity: int = 0
    reconstructed: bool = False

    @property
    def worth_a_checkpoint(self) -> bool:
        """Whether it was trained; surgery and recalibration are repeated as fast as read."""
        return self.reconstructed or (self.training is not None and self.training.step > 0)

    def checkpoint(self) -> tuple[str, bytes]:
        """The recipe as JSON, and weights and training as safetensors."""
        assert self.recipe is not None and self.training is not None
        tensors = {f"model.{name}": value for name, value in copy_state(self.model).items()}
        state = {f"training.{name}": value for name, value in self.training.state().items()}
        return self.recipe.to_json(), save(tensors | state)


def put_down(work: Work, write: Callable[[str, bytes], None], trial_id: str) -> None:
    """Writes a checkpoint; one that cannot be written only costs time, later.

    Args:
        work: Where the trial waits.
        write: Stores what `Work.checkpoint` returns.
        trial_id: For the warning.
    """
    try:
        write(*work.checkpoint())
    except Exception as error:  # a full disk, a keeper that is gone
        warnings.warn(
            f"trial {trial_id} has no checkpoint and may start afresh: {_first_line(error)}",
            stacklevel=2,
        )


def take_up(
    read: Callable[[], tuple[str, bytes] | None],
    trial_id: str,
    fidelity: int,
    context: TrialContext,
) -> Work | None:
    """Where a waiting trial goes on; None, and it starts afresh, when that is lost.

    Args:
        read: The checkpoint, if there is one.
        trial_id: For the warning.
        fidelity: The rung that was reached.
        context: The worker's shared parts.
    """
    try:
        checkpoint = read()
        return None if checkpoint is None else restore_work(*checkpoint, fidelity, context)
    except Exception as error:  # a damaged file, or one of another version
        warnings.warn(
            f"trial {trial_id} starts afresh, its checkpoint is not readable: "
            f"{_first_line(error)}",
            stacklevel=2,
        )
        return None


def restore_work(recipe: str, tensors: bytes, fidelity: int, context: TrialContext) -> Work:
    """Inverse of `Work.checkpoint`; goes on to the same weights, bit for bit.

    Args:
        recipe: As JSON.
        tensors: As safetensors.
        fidelity: The rung that was reached.
        context: The worker's shared parts.
    """
    removed = Recipe.from_json(recipe)
    model = prune(context.dense, context.plan, removed)
    state = load(tensors)
    load_state(model, _part(state, "model."))
    training = make_training(model, context, torch.Generator())
    assert training is not None
    training.load_state(_part(state, "training."))
    return Work(model.eval(), removed, training, fidelity)


def make_training(
    model: nn.Module, context: TrialContext, generator: torch.Generator
) -> Finetuning | None:
    """The config's fine-tuning of a pruned model, not begun; None when there is none.

    Args:
        model: Pruned and recalibrated.
        context: The worker's shared parts.
        generator: Draws the images.
    """
    recover = context.config.recover
    if recover.epochs == 0:
        return None
    options = FinetuneOptions(
        epochs=recover.epochs,
        lr=recover.lr,
        momentum=recover.momentum,
        weight_decay=recover.weight_decay,
        distill=recover.distill,
        augment=context.config.data.augment,
        milestones=recover.milestones,
        gamma=recover.gamma,
        autocast=recover.autocast,
    )
    teacher = context.dense if recover.distill > 0 else None
    return Finetuning(
        model,
        context.task,
        options,
        generator=generator,
        teacher=teacher,
        devices=context.devices,
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
