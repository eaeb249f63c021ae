"""A task without data, for criteria and reconstruction that need none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn


class NoData:
    """Knows the shape of the images and the number of classes, and nothing else.

    Data-free methods take the shape from `example_input`. Whatever needs images or labels raises.

    Args:
        input_shape: Of one image, (C, H, W).
        num_classes: Outputs of the model.
        device: Where the example input, and so the model, lives.

    Raises:
        ValueError: If a size is below 1.
    """

    num_train = 0
    batch_size = 1

    def __init__(
        self,
        input_shape: Sequence[int] = (3, 32, 32),
        num_classes: int = 10,
        device: str | torch.device = "cpu",
    ) -> None:
        if len(input_shape) < 1 or min(input_shape) < 1:
            raise ValueError(
                f"`input_shape` (={tuple(input_shape)}) must hold sizes of at least 1: it is the "
                "shape of one image. Use for example (3, 32, 32)."
            )
        if num_classes < 1:
            raise ValueError(
                f"`num_classes` (={num_classes}) must be at least 1: it counts the model's "
                "outputs. Use for example 10."
            )
        self.input_shape = tuple(input_shape)
        self.num_classes = num_classes
        self.device = torch.device(device)

    def example_input(self, batch_size: int = 1) -> Tensor:
        """Zeros, [batch_size, *input_shape]."""
        return torch.zeros(batch_size, *self.input_shape, device=self.device)

    def calibration_batches(self) -> list[tuple[Tensor, Tensor]]:
        """There are none.

        Raises:
            ValueError: Always.
        """
        _refuse("calibration images are read")

    def train_batches(self, *args: Any, **kwargs: Any) -> NoReturn:
        """There are none.

        Raises:
            ValueError: Always.
        """
        _refuse("training images are read")

    def batches(self, *args: Any, **kwargs: Any) -> NoReturn:
        """There are none.

        Raises:
            ValueError: Always.
        """
        _refuse("images are read")

    def evaluate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """There is nothing to evaluate on.

        Raises:
            ValueError: Always.
        """
        _refuse("the model is evaluated on images")

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """There are no labels.

        Raises:
            ValueError: Always.
        """
        _refuse("a loss compares outputs with labels")

    def training_loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> NoReturn:
        """There are no labels.

        Raises:
            ValueError: Always.
        """
        _refuse("a loss compares outputs with labels")


def _refuse(what: str) -> NoReturn:
    raise ValueError(
        f"`data` (=none) must be a data set here: {what}. Name a data set, or use a data-free "
        "method (blockwipg, synflow, magnitude)."
    )
