"""Object detection: the sum of a detector's losses, mAP, mirrored images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ..data.boxes import IGNORED, LABEL, unpack_boxes
from ..data.image_data import ImageData
from ..names import unknown_name
from ..seeding import seeded
from .detection_meter import Accuracy, DetectionMeter, check_libraries
from .images import ImageTask

Targets = list[dict[str, Tensor]]

METRICS = {"map50_95": "mAP@.5:.95", "map50": "mAP@.5"}
REASONS = {
    "fgp": "it weighs features by the gradient of an image's class, and an image here has many "
    "objects, or none",
    "hessian": "it needs the loss of each image from one forward pass, and a detector's is the "
    "mean over the batch",
    "synflow": "it adds up a network's outputs, and those of a detector are lists of boxes",
    "distill": "it compares class probabilities, and two detectors put out different boxes",
}


class DetectionTask(ImageTask):
    """Batches, loss and metrics of an object detection data set; see `ImageTask`.

    A model takes [B, C, H, W]. In train mode it takes targets too and returns losses by name; in
    eval mode it returns for each image `boxes` [n, 4] (xyxy, pixels), `scores` and `labels`, from
    1, as torchvision's detectors do (models/detectors.py wraps them). The targets are a list with
    `boxes`, `labels` and `iscrowd` (1 where an object is ignored) of each image.

    Args:
        data: The data set, its labels rows of boxes as in data/boxes.py.
        batch_size: Images in a batch, at least 2 (batch norm cannot train on one).
        calibration_size: Images of the calibration split, at most as many as there are to train.
        seed: Chooses the calibration split, and the boxes that a detector draws when it is scored.
        device: Where the images, and the models to come, live.
        accuracy: The figure to optimise: `map50_95` (COCO's) or `map50`.

    Raises:
        ValueError: If a size is too small, `accuracy` is unknown, or a library is missing.
    """

    name = "detection"

    def __init__(
        self,
        data: ImageData,
        *,
        batch_size: int = 128,
        calibration_size: int = 512,
        seed: int = 0,
        device: str | torch.device = "cpu",
        accuracy: Accuracy = "map50_95",
    ) -> None:
        check_libraries()
        if accuracy not in METRICS:
            raise ValueError(unknown_name("task.detection.accuracy", accuracy, METRICS))
        super().__init__(
            data,
            batch_size=batch_size,
            calibration_size=calibration_size,
            seed=seed,
            device=device,
        )
        self.metric = METRICS[accuracy]
        self._accuracy: Accuracy = accuracy
        self._seed = seed

    def training_loss(self, model: nn.Module, images: Tensor, targets: Targets) -> Tensor:
        """Sum of a detector's losses, a scalar; ignored objects are left out.

        A detector gives its losses in train mode only. One in eval mode is put there without its
        norms and dropout, and the boxes that it draws are the same each time: criteria score.
        """
        kept = [_trained_on(target) for target in targets]
        if model.training:
            return _total(model(images, kept))
        with _giving_losses(model), seeded(self._seed):
            return _total(model(images, kept))

    def loss(self, output: Any, targets: Targets) -> Tensor:
        """There is none: a detector's losses are no function of its detections.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "`task` (=detection) must be asked for `training_loss`: a detector's losses are no "
            "function of the boxes that it puts out. Use another method."
        )

    def meter(self) -> DetectionMeter:
        """A new meter of mAP, F1 and the figures of each class."""
        return DetectionMeter(self.data.classes, self._accuracy)

    def misfit(self, output: Any, images: Tensor) -> str | None:
        """What the model should return for `images` in eval mode; None if `output` is that."""
        keys = {"boxes", "scores", "labels"}
        suits = (
            isinstance(output, Sequence)
            and len(output) == len(images)
            and all(isinstance(found, Mapping) and keys <= set(found) for found in output)
        )
        return None if suits else "for each image a dict of `boxes`, `scores` and `labels`"

    def supports(self, method: str) -> str | None:
        """Why a method makes no sense on detection; None if it does."""
        return REASONS.get(method)

    def _augmented(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        if not self.data.horizontal_flip:
            return images, labels
        return mirror(images, labels, generator)

    def _targets(self, labels: Tensor) -> Targets:
        return unpack_boxes(labels)


def mirror(images: Tensor, boxes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirrors half of the images left and right, and their boxes with them.

    Args:
        images: [B, C, H, W].
        boxes: [B, m, 6], rows as in data/boxes.py.
        generator: Source of randomness.

    Returns:
        New images and boxes, of the same shapes.
    """
    drawn = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
    mirrored = drawn.to(images.device)
    flipped = boxes.clone()
    flipped[..., 0] = images.shape[-1] - boxes[..., 2]
    flipped[..., 2] = images.shape[-1] - boxes[..., 0]
    turned = mirrored[:, None, None] & (boxes[..., LABEL:IGNORED] > 0)
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images, torch.where(turned, flipped, boxes)


def _trained_on(target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`boxes` and `labels` of the objects that are not ignored."""
    real = target["iscrowd"] == 0
    return {"boxes": target["boxes"][real], "labels": target["labels"][real]}


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


@contextmanager
def _giving_losses(model: nn.Module) -> Iterator[None]:
    """Train mode, except for norms and dropout; every module back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    for module in model.modules():
        module.training = not isinstance(module, (_BatchNorm, _DropoutNd))
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
