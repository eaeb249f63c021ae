"""A task: what training and evaluation mean. Here classification with another metric."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from prunesearch.methods.tasks import ClassificationTask


class BalancedMeter:
    """Adds up outputs batch by batch; every class counts alike.

    Args:
        num_classes: How many.
        device: Of the outputs.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._right = torch.zeros(num_classes, device=device)
        self._all = torch.zeros(num_classes, device=device)
        self._loss = 0.0

    def update(self, output: Tensor, targets: Tensor) -> None:
        """Takes in logits [B, num_classes] and classes [B]."""
        hit = (output.argmax(1) == targets).float()
        self._right.index_add_(0, targets, hit)
        self._all.index_add_(0, targets, torch.ones_like(hit))
        self._loss += float(F.cross_entropy(output, targets, reduction="sum"))

    def compute(self) -> dict[str, float]:
        """`accuracy` is what the search maximises; `loss` must be there too."""
        seen = self._all > 0
        return {
            "accuracy": float((self._right[seen] / self._all[seen]).mean()),
            "loss": self._loss / float(self._all.sum()),
        }


class BalancedTask(ClassificationTask):
    """Classification where accuracy is the mean over the classes."""

    name = "balanced"
    metric = "balanced accuracy"

    def meter(self) -> BalancedMeter:
        """A new meter of a model's outputs."""
        return BalancedMeter(self.num_classes, self.device)
