"""What the criteria share: the task they need, and a safe way to run the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from ..trace import evaluating


class DataFreeTask(Protocol):
    """What a criterion that reads no data needs of a task: the shape of an image."""

    def example_input(self, batch_size: int = 1) -> Tensor:
        """A batch that the model accepts, [batch_size, C, H, W]; its values may be anything."""


class CalibrationTask(DataFreeTask, Protocol):
    """What a criterion needs of a task. Calibration batches are drawn from training data."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    def calibration_batches(self) -> list[tuple[Tensor, Tensor]]:
        """Fixed batches of images [B, C, H, W] and labels [B], on the model's device."""

    def training_loss(self, model: nn.Module, images: Tensor, target: Tensor, /) -> Tensor:
        """Mean loss of a batch, a scalar; the model stays in its mode."""

    def loss(self, logits: Tensor, target: Tensor, /) -> Tensor:
        """The same as a function of the outputs."""


@contextlib.contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, gradients on, every parameter frozen; all put back at the end.

    Frozen, because a criterion asks for the gradients it needs and no other. The `grad` fields
    are never written: take gradients with `torch.autograd.grad`.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with evaluating(model), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


def check_batch(name: str, given: Tensor, num_images: int) -> None:
    """Checks that a layer's input has one row an image.

    Raises:
        ValueError: If not: gradients of single images cannot be told apart there.
    """
    if len(given) != num_images:
        raise ValueError(
            f"`layers` (={name!r}) must keep the images of a batch apart: of {num_images} images "
            f"it gets a tensor with {len(given)} rows. Use a criterion without gradients of "
            "single images, such as magnitude_l2."
        )
