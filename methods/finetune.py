"""Recovery after pruning, and the training of the dense model.

Batch-norm recalibration: Li et al. 2020 (EagleEye), arXiv:2007.02491. Distillation: Hinton et al.
2015, arXiv:1503.02531.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .trace import evaluating

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
WARMUP_FRACTION = 0.1
DISTILL_TEMPERATURE = 4.0


def recalibrate_batch_norm(
    model: nn.Module, task: Any, *, generator: torch.Generator, num_images: int = 2048
) -> None:
    """Re-estimates the running statistics of every batch norm on training images.

    The statistics become the plain average over the batches; no weight changes.

    Args:
        model: Changed in place; its train/eval mode is restored.
        task: Supplies un-augmented training batches.
        generator: Draws the images.
        num_images: How many images to use.
    """
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with evaluating(model), torch.inference_mode():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()
        whole = min(num_images, task.num_train) // task.batch_size * task.batch_size
        # a small last batch would weigh as much as a whole one
        for images, _ in task.train_batches(
            generator, max_images=whole or num_images, augment=False
        ):
            model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def finetune(
    model: nn.Module,
    task: Any,
    *,
    epochs: float,
    lr: float,
    generator: torch.Generator,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    teacher: nn.Module | None = None,
    distill: float = 0.0,
    augment: bool = True,
    milestones: Sequence[float] | None = None,
    gamma: float = 0.1,
    on_epoch: Callable[[int, float], None] | None = None,
) -> None:
    """Trains `model` with SGD (Nesterov), in place.

    The rate warms up and follows a cosine, or falls in steps where `milestones` are given.

    Args:
        model: Ends in eval mode.
        task: Supplies augmented training batches and the loss.
        epochs: Passes over the training split; a fraction trains on that share of it.
        lr: Peak learning rate.
        generator: Draws the batches and the augmentation.
        momentum: SGD momentum.
        weight_decay: Applied to every parameter.
        teacher: The dense model; needed when `distill` > 0.
        distill: Weight of the distillation term, 0 to 1; the label loss has the rest.
        augment: Whether training images are augmented as suits the data set.
        milestones: Fractions of the training, in (0, 1), at which the rate is multiplied by
            `gamma`; no warm-up then. None for the cosine.
        gamma: See `milestones`.
        on_epoch: Called after each epoch with its number (from 1) and its mean training loss.

    Raises:
        FloatingPointError: If the loss is no longer finite.
    """
    if epochs <= 0:
        return
    sizes = epoch_sizes(epochs, task.num_train)
    total = sum(_num_batches(size, task.batch_size) for size in sizes)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0
    )

    def rate(step: int) -> float:
        if milestones is None:
            return _cosine(step, total)
        return gamma ** sum(step >= fraction * total for fraction in milestones)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for epoch, max_images in enumerate(sizes, start=1):
        losses = []
        for images, target in task.train_batches(
            generator, max_images=max_images, augment=augment
        ):
            loss = _loss(model, task, images, target, teacher, distill)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        mean = float(torch.stack(losses).mean()) if losses else 0.0
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the training loss became {mean} in epoch {epoch}; a lower `lr` (={lr}) may help"
            )
        if on_epoch is not None:
            on_epoch(epoch, mean)
    model.eval()


def _loss(
    model: nn.Module,
    task: Any,
    images: Tensor,
    target: Tensor,
    teacher: nn.Module | None,
    distill: float,
) -> Tensor:
    logits = model(images)
    loss: Tensor = task.loss(logits, target)
    if distill > 0:
        assert teacher is not None
        with torch.no_grad():
            soft = F.softmax(teacher(images) / DISTILL_TEMPERATURE, dim=1)
        student = F.log_softmax(logits / DISTILL_TEMPERATURE, dim=1)
        kl = F.kl_div(student, soft, reduction="batchmean") * DISTILL_TEMPERATURE**2
        loss = (1 - distill) * loss + distill * kl
    return loss


def epoch_sizes(epochs: float, num_train: int) -> list[int]:
    """Images of each pass: whole ones, then the fraction."""
    whole = int(epochs)
    rest = round((epochs - whole) * num_train)
    return [num_train] * whole + ([rest] if rest >= 2 else [])  # one image is no batch


def _num_batches(num_images: int, batch_size: int) -> int:
    """A last batch of one image is dropped: batch norm cannot train on it."""
    return num_images // batch_size + (num_images % batch_size > 1)


def _cosine(step: int, total: int) -> float:
    warmup = max(1, int(WARMUP_FRACTION * total))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
