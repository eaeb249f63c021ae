"""A task owns what training, scoring and evaluation need to know about data and outputs.

`images` is a float32 tensor [B, C, H, W] on the task's device for every task. `targets` is int64
[B] for classification, int64 [B, H, W] with the ignore index 255 for segmentation, and for
detection a list of dicts: `boxes` [N, 4], float32, (x1, y1, x2, y2) in pixels, and `labels` [N],
int64 from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..data import Data, find_dataset
from ..names import unknown_name
from ..options import check_options
from ..plugins import plugins
from ..user_code import import_callable
from .classification import ClassificationTask
from .detection import DetectionTask
from .images import SplitName
from .meter import Meter
from .segmentation import SegmentationTask

__all__ = [
    "TASKS",
    "ClassificationTask",
    "DetectionTask",
    "Meter",
    "SegmentationTask",
    "Meter",
    "SplitName",
    "Task",
    "TaskBuilder",
    "find_task",
    "make_task",
    "task_names",
    "quick_split",
    "task_of",
]

BUILD_ARGUMENTS = ("batch_size", "calibration_size", "seed", "device")
"""Keyword-only arguments of every task's constructor that are not options of the task."""


class Task(Protocol):
    """Batches, loss and metrics of a data set.

    A task is built by `f(data, *, batch_size, calibration_size, seed, device, **options)`.
    """

    @property
    def name(self) -> str:
        """classification, segmentation, detection, or a name of the user's."""

    @property
    def metric(self) -> str:
        """What `accuracy` means: top-1, mIoU, mAP."""

    @property
    def data(self) -> Data:
        """The data set, on the device or not."""

    @property
    def device(self) -> torch.device:
        """Where the batches, and the models to come, live."""

    @property
    def batch_size(self) -> int:
        """Images in a training batch."""

    @property
    def num_classes(self) -> int:
        """What models are built with."""

    @property
    def num_train(self) -> int:
        """Training images."""

    def train_batches(
        self,
        generator: torch.Generator,
        *,
        max_images: int | None = None,
        augment: bool = True,
    ) -> Iterator[tuple[Tensor, Any]]:
        """One epoch of shuffled training batches; a last batch of one image is dropped.

        `generator` decides order and augmentation, the same on every device. `max_images` (at
        least 2) shortens the epoch.
        """

    def calibration_batches(self) -> list[tuple[Tensor, Any]]:
        """The calibration split: a fixed part of train, not augmented."""

    def batches(
        self, split: SplitName, *, batch_size: int | None = None
    ) -> Iterator[tuple[Tensor, Any]]:
        """All images of a split in order, not augmented."""

    def example_input(self, batch_size: int = 1) -> Tensor:
        """Calibration images, [batch_size, C, H, W], repeated where too few."""

    def training_loss(self, model: nn.Module, images: Tensor, targets: Any, /) -> Tensor:
        """The loss that a model is trained and scored by: the mean over a batch, a scalar.

        The model stays in its mode (train or eval), its norms and dropout in particular.
        """

    def loss(self, output: Any, targets: Any, /) -> Tensor:
        """The same where it is a function of the model's output.

        Raises:
            ValueError: If it is not; `supports` then refuses the methods that ask for it.
        """

    def meter(self) -> Meter:
        """A new meter of a model's outputs in eval mode."""

    def evaluate(
        self, model: nn.Module, split: SplitName = "val", *, batch_size: int | None = None
    ) -> dict[str, float]:
        """Evaluates in eval mode and restores every module's mode.

        Returns:
            `accuracy`, the primary metric as a fraction, `loss`, and the task's further figures.
        """

    def misfit(self, output: Any, images: Tensor, /) -> str | None:
        """What the model should return for `images` in eval mode; None if `output` is that."""

    def supports(self, method: str, /) -> str | None:
        """Why a method makes no sense on this task; None if it does.

        Args:
            method: A criterion, a sparse training, an order of blocks, `distill` (the outputs of
                the dense model as a further target) or `reconstruct` (block reconstruction).
        """


TaskBuilder = Callable[..., Task]

TASKS: dict[str, TaskBuilder] = {
    "classification": ClassificationTask,
    "segmentation": SegmentationTask,
    "detection": DetectionTask,
}


def quick_split(task: Any) -> SplitName:
    """The split that stands for val where many models are compared, and figures may be rough.

    Val itself, unless the task has a `quick_split`: then it also has `size(split)`.
    """
    found: SplitName = getattr(task, "quick_split", "val")
    return found


def task_of(dataset: str) -> str:
    """The task that a data set is for.

    Raises:
        ValueError: If there is no such data set.
    """
    return find_dataset(dataset).task


def task_names() -> tuple[str, ...]:
    """Ours, and those of installed plug-ins."""
    return (*TASKS, *plugins("tasks", TASKS))


def find_task(name: str) -> TaskBuilder:
    """The class of a task: ours, a plug-in's, or the user's `module:callable`.

    Raises:
        ValueError: If there is none of that name.
    """
    if ":" in name:
        return import_callable(name, "task", "task")
    if name in TASKS:
        return TASKS[name]
    offered = plugins("tasks", TASKS)
    if name not in offered:
        raise ValueError(unknown_name("task", name, [*task_names(), "package.module:callable"]))
    build: TaskBuilder = offered[name].load()
    return build


def make_task(
    name: str | None,
    data: Data,
    *,
    batch_size: int = 128,
    calibration_size: int = 512,
    seed: int = 0,
    device: torch.device | str = "cpu",
    options: Mapping[str, Any] | None = None,
) -> Task:
    """The task over a data set.

    Args:
        name: See `find_task`; None for the one that the data set is for.
        data: The data set.
        batch_size: Images in a batch.
        calibration_size: Images of the calibration split.
        seed: Chooses the calibration split.
        device: Where batches and models live.
        options: Of the task.

    Raises:
        ValueError: If the name or an option is unknown, or the data are of another task.
    """
    wanted = name or task_of(data.name)
    build, given = find_task(wanted), dict(options or {})
    if wanted in TASKS:
        if (suits := task_of(data.name)) != wanted:
            raise ValueError(
                f"`task` (={wanted}) must suit `data.name` (={data.name}), which is for {suits}. "
                "Leave task out, or name another data set."
            )
        constructor = build.__init__
        check_options(wanted, constructor, given, without=BUILD_ARGUMENTS)
    if build is ClassificationTask and hasattr(data.train, "paths"):
        from .streamed import StreamedTask  # the loader takes a while to import

        build = StreamedTask
    return build(
        data,
        batch_size=batch_size,
        calibration_size=calibration_size,
        seed=seed,
        device=device,
        **given,
    )
