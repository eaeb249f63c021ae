"""What all methods start from, as files, and the recovery that they share."""

from __future__ import annotations

import dataclasses
import math
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....methods.finetune import finetune, recalibrate_batch_norm
from ....methods.layout import prefer_channels_last
from ....methods.tasks import Task
from ...config import SearchConfig, dump_config, load_config
from ...dense import prepare_dense
from ...setup import load_images, make_model, make_task, pose, trial_device
from ...store import atomic_write_bytes

CONFIG = "config.yaml"
DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class PeerProblem:
    """A folder with the config, which names the dense weights beside it as its checkpoint."""

    folder: Path

    @cached_property
    def config(self) -> SearchConfig:
        """The seed's config."""
        return load_config(self.folder / CONFIG)

    @cached_property
    def task(self) -> Task:
        """The data, on the device that trains."""
        return make_task(self.config, load_images(self.config), trial_device(self.config))

    @cached_property
    def dense(self) -> nn.Module:
        """The dense model with its trained weights, laid out as trials have it; a constant."""
        model = make_model(self.config, self.task.num_classes).to(self.task.device)
        prefer_channels_last(model, self.task.example_input(2))
        return model

    @property
    def baseline(self) -> dict[str, Any]:
        """The dense model's metrics."""
        from ...store import read_json

        return dict(read_json(self.folder / DENSE / "baseline.json"))

    @property
    def workers(self) -> int:
        """How many trials run at a time."""
        resources = self.config.resources
        fit = int(len(os.sched_getaffinity(0)) / resources.cpu + 1e-9)
        return max(1, min(fit, resources.max_concurrent or fit))

    @property
    def threads(self) -> int:
        """Torch threads of one worker."""
        return max(1, int(self.config.resources.cpu))

    def generator(self, number: int) -> torch.Generator:
        """The source of randomness of candidate `number`."""
        return torch.Generator().manual_seed(self.config.search.seed * 1_000_003 + number)

    def recalibrate(self, model: nn.Module, generator: torch.Generator) -> None:
        """The first part of recovery: batch-norm statistics, if the config asks for them."""
        recover = self.config.recover
        if recover.recalibrate_bn:
            recalibrate_batch_norm(
                model, self.task, generator=generator, num_images=recover.recalibration_images
            )

    def finetune(self, model: nn.Module, generator: torch.Generator) -> None:
        """The second part of recovery: the config's fine-tuning.

        Raises:
            FloatingPointError: If a loss is not finite.
        """
        recover = self.config.recover
        finetune(
            model,
            self.task,
            epochs=recover.epochs,
            lr=recover.lr,
            momentum=recover.momentum,
            weight_decay=recover.weight_decay,
            milestones=recover.milestones,
            gamma=recover.gamma,
            autocast=recover.autocast,
            generator=generator,
            augment=self.config.data.augment,
            teacher=self.dense if recover.distill > 0 else None,
            distill=recover.distill,
        )

    def accuracy(self, model: nn.Module) -> float:
        """Validation accuracy.

        Raises:
            FloatingPointError: If the validation loss is not finite.
        """
        metrics = self.task.evaluate(model, "val")
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(f"the validation loss is {metrics['loss']}")
        return metrics["accuracy"]

    def recover(self, model: nn.Module, number: int) -> float:
        """The whole recovery of candidate `number`, in place; its validation accuracy."""
        generator = self.generator(number)
        self.recalibrate(model, generator)
        self.finetune(model, generator)
        return self.accuracy(model)


def pose_problem(config: SearchConfig, folder: Path, say: Any) -> PeerProblem:
    """Trains (or finds in the cache) the dense model and writes what all methods start from."""
    problem = pose(config)
    prepare_dense(problem, folder / DENSE, say)
    weights = folder / DENSE / "weights" / "dense.safetensors"
    model = config.model.model_copy(update={"checkpoint": str(weights.absolute())})
    given = config.model_copy(update={"model": model})
    atomic_write_bytes(folder / CONFIG, dump_config(given).encode())
    return PeerProblem(folder)
