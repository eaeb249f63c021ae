"""Decoupled sparse training (DSD). Qiu et al. 2024, doi:10.1109/ACCESS.2024.3382994.

Slimming, its rival: Liu et al. 2017, arXiv:1708.06519.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ..finetune import epoch_sizes
from ..options import Bounds, check_options, options_of
from .channels import Channels
from .freeze import Freeze, Freezer, FreezeScope, frozen_parts, producers_of
from .history import Phase, Snapshot, SparseHistory, summarize
from .masks import Action, ImportantSet, Metric, MetricUpdate, Threshold
from .step import Penalty, Step

if TYPE_CHECKING:
    from ..layers import Layer

Strategy = Literal["both", "phase1_only", "slimming"]

RUN_ARGUMENTS = (
    "lam",
    "q",
    "epochs",
    "lr",
    "momentum",
    "weight_decay",
    "generator",
    "augment",
    "on_epoch",
)
"""Keyword-only arguments of a sparse training that are not options."""

UNUSED: dict[str, tuple[str, ...]] = {
    "phase1_only": ("phase1_share", "freeze", "freeze_scope"),
    "slimming": (
        "phase1_share",
        "metric",
        "metric_update",
        "ema",
        "threshold",
        "tau_important",
        "tau_redundant",
        "beta_important",
        "beta_redundant",
        "freeze",
        "freeze_scope",
    ),
}
"""What a strategy ignores."""


def sparse_train(
    model: nn.Module,
    task: Any,
    norms: Sequence[str],
    *,
    lam: float,
    q: float,
    epochs: float,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    generator: torch.Generator,
    augment: bool = True,
    on_epoch: Callable[[int, float], None] | None = None,
    strategy: Strategy = "both",
    phase1_share: Annotated[float, Bounds(0, 1)] = 2 / 3,
    metric: Metric = "abs_product",
    metric_update: MetricUpdate = "iteration",
    ema: Annotated[float, Bounds(0, 0.999)] = 0.0,
    threshold: Threshold = "global",
    tau_important: Action = "reward",
    tau_redundant: Action = "penalize",
    beta_important: Action = "none",
    beta_redundant: Action = "penalize",
    freeze: Freeze = "exact",
    freeze_scope: FreezeScope = "bn",
) -> SparseHistory:
    """Drives the batch-norm scales of the channels to be removed to zero (DSD, slimming).

    Trains `model` in place.

    With tau and beta the scale and shift of the batch norms, after each backward pass:
    phase 1: E = the int(n (1 - q)) channels of the largest |grad tau * tau|, N = the rest;
    tau.grad += lam sign(tau) and beta.grad += lam sign(beta) on N; tau.grad -= lam sign(tau) on E.
    Phase 2: no lam; E is the last one of phase 1 (that of the first batch if there was none), tau
    and beta of N stay. Eqs. 5-14 of the paper. Then prune the fraction q of the channels with the
    smallest |tau|.

    Plain SGD at a constant rate: the paper gives one rate and no schedule. The penalty moves a
    scale by about lr lam / (1 - momentum) a step, so scale `lam` with the epochs available.

    Args:
        model: Ends in eval mode, without gradients.
        task: Supplies augmented training batches, the loss and, for `filter`, an example input.
        norms: Names of the batch norms whose channels can be removed.
        lam: Weight of the penalty, at least 0.
        q: Fraction of the channels that is to be removed, between 0 and 1.
        epochs: Passes over the training split in all; a fraction trains on that share of it.
        lr: Learning rate.
        momentum: SGD momentum.
        weight_decay: Applied to every parameter that is not frozen.
        generator: Draws the batches and the augmentation.
        augment: Whether training images are augmented as suits the data set.
        on_epoch: Called after each pass with its number (from 1) and its mean training loss.
        strategy: `both` phases; `phase1_only`, for all epochs; `slimming`: all scales penalized
            for all epochs, nothing else.
        phase1_share: Share of the epochs in phase 1; each phase has passes of its own, so there
            may be one pass more than epochs.
        metric: What makes a channel important: |grad tau|, |tau|, grad tau * tau or its size.
        metric_update: When E is chosen anew in phase 1: each iteration, at the first iteration
            of each epoch, or at the very first.
        ema: Share of the past in a running mean of the metric over the iterations; 0 for none. In
            a short training gradients of single batches shuffle E: try 0.95.
        threshold: E is chosen over all batch norms or in each (there at least one channel).
        tau_important: What happens to tau on E in phase 1.
        tau_redundant: What happens to tau on N in phase 1.
        beta_important: What happens to beta on E in phase 1.
        beta_redundant: What happens to beta on N in phase 1.
        freeze: `exact`: N stays bit by bit; `grad_zero`: its gradients are zero, but momentum and
            weight decay still move it. Running statistics go on in both.
        freeze_scope: What of N stays: tau and beta, or also the filter and bias in front of them.

    Returns:
        The course of the training. Under slimming E is the channels of the largest |tau|.

    Raises:
        ValueError: If a value is not allowed, or a norm is no trainable batch norm that the model
            uses.
        FloatingPointError: If the loss is no longer finite.
    """
    _check(locals())  # the arguments, while there is nothing else
    passes = _passes(strategy, epochs, phase1_share, task.num_train)
    if strategy == "slimming":
        metric, metric_update, ema, threshold = "abs_scale", "iteration", 0.0, "global"
        tau_important = tau_redundant = "penalize"
        beta_important = beta_redundant = "none"
    channels = Channels(model, norms)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    producers: dict[str, list[Layer]] = {}
    if freeze_scope == "filter" and passes[-1].phase == "finetuning":
        producers = producers_of(model, channels.norms, task.example_input(2))
    step = Step(
        channels,
        ImportantSet(
            channels.widths,
            q,
            metric=metric,
            metric_update=metric_update,
            ema=ema,
            threshold=threshold,
            device=channels.device,
        ),
        Penalty(lam, tau_important, tau_redundant, beta_important, beta_redundant),
        optimizer,
        lambda redundant: Freezer(
            optimizer, frozen_parts(channels.norms, redundant, producers), freeze
        ),
    )
    snapshots = []
    model.train()
    for epoch, one in enumerate(passes, start=1):
        batches = task.train_batches(generator, max_images=one.num_images, augment=augment)
        snapshots.append(_train(model, task, batches, step, one))
        loss = snapshots[-1].loss
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss became {loss} in epoch {epoch}; a lower `lr` (={lr}) or "
                f"`lam` (={lam}) may help"
            )
        if on_epoch is not None:
            on_epoch(epoch, loss)
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    return summarize(snapshots)


def _train(
    model: nn.Module,
    task: Any,
    batches: Iterable[tuple[Tensor, Tensor]],
    step: Step,
    one: _Pass,
) -> Snapshot:
    """One pass over `batches`."""
    started, before, losses = time.perf_counter(), step.mask, list[Tensor]()
    for images, target in batches:
        loss = task.training_loss(model, images, target)
        step.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        after = step(one.phase, new_epoch=not losses)
        before = after if before is None else before
        losses.append(loss.detach())
    assert before is not None
    return Snapshot(
        phase=one.phase,
        num_images=one.num_images,
        loss=float(torch.stack(losses).mean()),  # waits for the device, so the time is right
        seconds=time.perf_counter() - started,
        scales=step.channels.tau().abs().cpu(),
        before=before.cpu(),
        after=after.cpu(),
    )


@dataclass(frozen=True)
class _Pass:
    phase: Phase
    num_images: int


def _passes(strategy: Strategy, epochs: float, phase1_share: float, num_train: int) -> list[_Pass]:
    """The passes of each phase: whole ones, then the fraction.

    Raises:
        ValueError: If there is not one batch to train on.
    """
    if strategy == "both":
        first = epochs * phase1_share
        phases: list[tuple[Phase, float]] = [("decoupling", first), ("finetuning", epochs - first)]
    else:
        phases = [("slimming" if strategy == "slimming" else "decoupling", epochs)]
    passes = [
        _Pass(phase, size) for phase, share in phases for size in epoch_sizes(share, num_train)
    ]
    if not passes:
        raise ValueError(
            f"`epochs` (={epochs}) must cover at least 2 of the {num_train} training images: "
            "batch norm cannot train on one. Raise it."
        )
    return passes


def _check(given: Mapping[str, Any]) -> None:
    """Checks the arguments of `sparse_train`, and warns of options that its strategy ignores."""
    defaults = options_of(sparse_train, without=RUN_ARGUMENTS)
    options = {name: given[name] for name in defaults}
    check_options("dsd", sparse_train, options, without=RUN_ARGUMENTS)
    if not (given["lam"] >= 0 and math.isfinite(given["lam"])):
        raise ValueError(
            f"`lam` (={given['lam']}) must be a number from 0 up: it is the weight of the "
            "penalty, and `reward` turns its sign. Use for example 5e-4."
        )
    if not 0 < given["q"] < 1:
        raise ValueError(
            f"`q` (={given['q']}) must lie between 0 and 1: it is the fraction of the channels to "
            "be removed, and some must stay. Use for example 0.5."
        )
    if not (given["epochs"] > 0 and math.isfinite(given["epochs"])):
        raise ValueError(
            f"`epochs` (={given['epochs']}) must be above 0: sparse training has to move the "
            "scales. Use for example 3."
        )
    unused = [
        name for name in UNUSED.get(given["strategy"], ()) if options[name] != defaults[name]
    ]
    if given["ema"] and given["metric_update"] == "once" and "ema" not in unused:
        unused.append("ema")  # the first iteration has no past
    if unused:
        warnings.warn(
            f"sparse training with strategy={given['strategy']} and "
            f"metric_update={given['metric_update']} does not use: {', '.join(unused)}",
            stacklevel=3,
        )
