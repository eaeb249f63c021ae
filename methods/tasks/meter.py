"""Figures of a model's outputs, added up batch by batch."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Meter(Protocol):
    """Adds up what one model put out; each task has its own."""

    def update(self, output: Any, targets: Any, /) -> None:
        """Takes in one batch, in eval mode and without gradients."""

    def compute(self) -> dict[str, float]:
        """`accuracy`, the primary metric as a fraction, `loss`, and the task's further figures."""


class ClassificationMeter:
    """Top-1 accuracy and mean cross entropy.

    Args:
        device: Of the outputs.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._count = 0

    def update(self, output: Tensor, targets: Tensor, /) -> None:
        """Takes in logits [B, num_classes] and classes [B]."""
        self._correct += (output.argmax(1) == targets).sum()
        self._loss += F.cross_entropy(output, targets, reduction="sum")
        self._count += len(targets)

    def compute(self) -> dict[str, float]:
        """`accuracy`, a fraction, and `loss`, the mean cross entropy."""
        return {
            "accuracy": self._correct.item() / self._count,
            "loss": self._loss.item() / self._count,
        }
