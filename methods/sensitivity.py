"""What one edit of a model costs alone: pruned, batch norms re-estimated, evaluated, no training.

Scoring layers one at a time before combining them: Li et al. 2017, arXiv:1608.08710, section 3.2;
with batch-norm recalibration: Li et al. 2020 (EagleEye), arXiv:2007.02491.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .finetune import recalibrate_batch_norm
from .surgery import PruningPlan, Recipe, prune
from .tasks import quick_split
from .trace import evaluating


@dataclass(frozen=True)
class Effect:
    """A model after an edit, on validation images.

    Attributes:
        accuracy: Fraction of the images, 0..1.
        loss: Mean over the images.
    """

    accuracy: float
    loss: float


def measure_edit(
    model: nn.Module,
    plan: PruningPlan,
    recipe: Recipe,
    task: Any,
    *,
    seed: int = 0,
    recalibrate_bn: bool = True,
    recalibration_images: int = 512,
    num_images: int = 2000,
) -> Effect:
    """Accuracy and loss of a copy of `model` that `recipe` was applied to.

    Args:
        model: The dense model; left as it was.
        plan: Its channel groups.
        recipe: What to remove.
        task: Supplies training batches, validation batches and the loss.
        seed: Draws the images of the recalibration, the same ones for every recipe.
        recalibrate_bn: Whether batch-norm statistics are re-estimated first.
        recalibration_images: Training images that they are re-estimated on.
        num_images: About so many validation images are evaluated, at most.
    """
    pruned = prune(model, plan, recipe)
    if recalibrate_bn and (recipe.dropped_blocks or recipe.kept):
        generator = torch.Generator().manual_seed(seed)
        recalibrate_batch_norm(pruned, task, generator=generator, num_images=recalibration_images)
    split = quick_split(task)
    count = len(task.data.val) if split == "val" else task.size(split)
    step = math.ceil(count / num_images)  # spread over the classes, if sorted by them
    meter = task.meter()
    with evaluating(pruned), torch.inference_mode():
        for images, targets in task.batches(split):
            meter.update(pruned(images[::step]), targets[::step])
    found = meter.compute()
    return Effect(found["accuracy"], found["loss"])
