"""Recovery after pruning, and the training of the dense model.

Batch-norm recalibration: Li et al. 2020 (EagleEye), arXiv:2007.02491. Distillation: Hinton et al.
2015, arXiv:1503.02531.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.sgd import sgd

from .data_parallel import Replicas
from .outputs import main_output
from .trace import evaluating

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
WARMUP_FRACTION = 0.1
DISTILL_TEMPERATURE = 4.0


def recalibrate_batch_norm(
    model: nn.Module, task: Any, *, generator: torch.Generator, num_images: int = 512
) -> None:
    """Re-estimates the running statistics of every batch norm on training images.

    The statistics become the plain average over the batches; no weight changes.

    Args:
        model: Changed in place; its train/eval mode is restored.
        task: Supplies un-augmented training batches.
        generator: Draws the images.
        num_images: How many images to use, in whole batches. How many are enough to rank pruned
            models: `prune-search bench recalibration`.
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
    autocast: bool = False,
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
        autocast: Whether the forward pass computes in bfloat16 where torch holds that safe; the
            weights stay float32.
        on_epoch: Called after each epoch with its number (from 1) and its mean training loss.

    Raises:
        FloatingPointError: If the loss is no longer finite.
    """
    if epochs <= 0:
        return
    options = FinetuneOptions(
        epochs, lr, momentum, weight_decay, distill, augment, milestones, gamma, autocast
    )
    Finetuning(model, task, options, generator=generator, teacher=teacher).run(on_epoch=on_epoch)


@dataclass(frozen=True)
class FinetuneOptions:
    """How a model is fine-tuned; `finetune` describes each."""

    epochs: float
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    distill: float = 0.0
    augment: bool = True
    milestones: Sequence[float] | None = None
    gamma: float = 0.1
    autocast: bool = False


class Finetuning:
    """Fine-tuning that may stop after any step and go on later, on another machine too.

    However often it stops, it ends with the same weights, bit for bit: the schedule is that of
    the whole training, and what was drawn of a cut epoch is drawn again.

    Args:
        model: Trained in place.
        task: Supplies augmented training batches and the loss.
        options: The whole training.
        generator: Draws the batches and the augmentation.
        teacher: The dense model; needed when `options.distill` > 0.
        devices: Further devices that share each batch with the task's.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        options: FinetuneOptions,
        *,
        generator: torch.Generator,
        teacher: nn.Module | None = None,
        devices: Sequence[torch.device] = (),
    ) -> None:
        self.step = 0
        self._devices = tuple(devices)
        self._model, self._task, self._options = model, task, options
        self._generator, self._teacher = generator, teacher
        self._sizes = epoch_sizes(options.epochs, task.num_train)
        counts = [_num_batches(size, task.batch_size) for size in self._sizes]
        self._starts = list(accumulate(counts, initial=0))  # steps before each epoch, and in all
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._momentum: dict[str, Tensor] = {}  # by parameter
        self._losses: list[Tensor] = []  # of this epoch so far
        self._drawn = generator.get_state()  # as this epoch began
        self._dropout = _global_states([task.device, *self._devices])

    @property
    def num_steps(self) -> int:
        """Steps of the whole training."""
        return self._starts[-1]

    def run(
        self, until: int | None = None, *, on_epoch: Callable[[int, float], None] | None = None
    ) -> None:
        """Trains until so many steps are done in all; `num_steps` for None.

        Args:
            until: Steps since the beginning. The model ends in eval mode.
            on_epoch: Called after each epoch with its number (from 1) and its mean training loss.

        Raises:
            FloatingPointError: If the loss is no longer finite.
        """
        until = self.num_steps if until is None else min(until, self.num_steps)
        _set_global_states(self._dropout, [self._task.device, *self._devices])
        self._generator.set_state(self._drawn)
        self._model.train()
        with closing(Replicas(self._model, self._teacher, self._devices)) as replicas:
            self._run(replicas, until, on_epoch)
        self._dropout = _global_states([self._task.device, *self._devices])
        self._model.eval()

    def _run(
        self, replicas: Replicas, until: int, on_epoch: Callable[[int, float], None] | None
    ) -> None:
        while self.step < until:
            epoch = bisect_right(self._starts, self.step)
            first, last = self._starts[epoch - 1], self._starts[epoch]
            self._train(replicas, epoch, self.step - first, min(until, last) - first)
            mean = self._mean_loss(epoch)
            if self.step < last:
                break  # in the middle of an epoch
            self._losses, self._drawn = [], self._generator.get_state()
            if on_epoch is not None:
                on_epoch(epoch, mean)

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on, beside the model's own weights; on the CPU."""
        momentum = {
            f"momentum.{name}": buffer.cpu().contiguous()
            for name, buffer in self._momentum.items()
        }
        dropout = {f"dropout.{n}": state.clone() for n, state in enumerate(self._dropout)}
        return {
            "step": torch.tensor(self.step),
            "drawn": self._drawn.clone(),
            "losses": torch.tensor([float(loss) for loss in self._losses]),
            **dropout,
            **momentum,
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on where a training with the same model, task and options was when it stopped.

        Args:
            state: From `state`. The model's own weights are loaded apart.
        """
        self.step = int(state["step"])
        self._drawn = state["drawn"].clone()
        self._losses = list(state["losses"].to(self._task.device))
        self._dropout = [state[f"dropout.{n}"].clone() for n in range(len(self._dropout))]
        for name, p in self._parameters.items():
            if (buffer := state.get(f"momentum.{name}")) is not None:
                self._momentum[name] = buffer.to(p.device, copy=True)

    def _train(self, replicas: Replicas, epoch: int, begin: int, end: int) -> None:
        """Trains on the batches from `begin` to before `end`; the others are drawn as before."""
        batches = self._task.train_batches(
            self._generator,
            max_images=self._sizes[epoch - 1],
            augment=self._options.augment,
        )
        for images, target in islice(batches, begin, end):
            loss = replicas.backward(self._loss, images, target)
            self._descend(self._options.lr * self._rate(self.step))
            self._losses.append(loss)
            self.step += 1

    def _loss(
        self, model: nn.Module, teacher: nn.Module | None, images: Tensor, target: Tensor
    ) -> Tensor:
        options = self._options
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=options.autocast):
            return _loss(model, self._task, images, target, teacher, options.distill)

    def _descend(self, lr: float) -> None:
        """One step of torch's SGD, by its function: the class would import torch's compiler.

        That takes 3 s in each process, as long as many a trial.
        """
        momentum = self._options.momentum
        moved = {n: (p, p.grad) for n, p in self._parameters.items() if p.grad is not None}
        buffers = [self._momentum.get(name) for name in moved]
        with torch.no_grad():
            sgd(
                [p for p, _ in moved.values()],
                [grad for _, grad in moved.values()],
                buffers,
                weight_decay=self._options.weight_decay,
                momentum=momentum,
                lr=lr,
                dampening=0.0,
                nesterov=momentum > 0,
                maximize=False,
            )
        self._momentum |= {n: b for n, b in zip(moved, buffers, strict=True) if b is not None}

    def _mean_loss(self, epoch: int) -> float:
        mean = float(torch.stack(self._losses).mean()) if self._losses else 0.0
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the training loss became {mean} in epoch {epoch}; a lower `lr` "
                f"(={self._options.lr}) may help"
            )
        return mean

    def _rate(self, step: int) -> float:
        """What the learning rate is multiplied by."""
        milestones, total = self._options.milestones, self.num_steps
        if milestones is None:
            return _cosine(step, total)
        return self._options.gamma ** sum(step >= part * total for part in milestones)


def _loss(
    model: nn.Module,
    task: Any,
    images: Tensor,
    target: Tensor,
    teacher: nn.Module | None,
    distill: float,
) -> Tensor:
    loss: Tensor
    if distill == 0:
        loss = task.training_loss(model, images, target)
        return loss
    assert teacher is not None
    output = model(images)
    loss = task.loss(output, target)
    with torch.no_grad():
        expected = main_output(teacher(images))
        soft = F.softmax(expected / DISTILL_TEMPERATURE, dim=1)
    student = F.log_softmax(main_output(output) / DISTILL_TEMPERATURE, dim=1)
    kl = F.kl_div(student, soft, reduction="batchmean") * DISTILL_TEMPERATURE**2
    return (1 - distill) * loss + distill * kl / expected[0, 0].numel()  # the mean over pixels


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


def _global_states(devices: Sequence[torch.device]) -> list[Tensor]:
    """States of torch's own generators, from which dropout draws: the CPU's and each GPU's."""
    gpus = [device for device in devices if device.type == "cuda"]
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in gpus)]


def _set_global_states(states: Sequence[Tensor], devices: Sequence[torch.device]) -> None:
    torch.set_rng_state(states[0])
    gpus = [device for device in devices if device.type == "cuda"]
    for gpu, state in zip(gpus, states[1:], strict=True):
        torch.cuda.set_rng_state(state, gpu)
