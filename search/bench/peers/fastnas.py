"""NVIDIA ModelOpt's FastNAS, one search for each of a ladder of MACs constraints."""

from __future__ import annotations

import copy
import itertools

import modelopt.torch.prune as mtp
import torch
from torch import Tensor

from ....methods.layout import prefer_channels_last
from .ladder import ladder
from .latencies import contiguous
from .log import Log
from .problem import PeerProblem

MACS = (0.1, 0.95)  # the constraints, as fractions of the dense model's MACs
DIVISOR = 4  # its default of 32 is more channels than a small model has
BATCHES = 50  # it calibrates batch norms on exactly so many, and with fewer not at all
BATCH = 32  # images: enough to calibrate, and half the time of a training batch
MAP = "sensitivity.pth"  # ModelOpt's own file, written and read by it alone


def run(problem: PeerProblem, log: Log, *, limit: int | None = None) -> None:
    """Searches under constraint after constraint until it is stopped.

    Args:
        problem: What is pruned.
        log: Where candidates go.
        limit: How many constraints; None for all that fit in the time.
    """
    torch.set_num_threads(problem.threads * problem.workers)
    torch.manual_seed(problem.config.search.seed)
    task = problem.task
    dense = contiguous(problem.dense)  # it refuses the other layout
    widths = mtp.fastnas.FastNASConfig()
    widths["nn.Conv2d"]["*"]["channel_divisor"] = DIVISOR
    widths["nn.BatchNorm2d"]["*"]["feature_divisor"] = DIVISOR
    settings = {
        "data_loader": _calibration(problem),
        "collect_func": lambda images: images,
        "score_func": lambda model: task.evaluate(model, "val")["accuracy"],
        "checkpoint": str(log.folder / MAP),
        "verbose": False,
    }
    for number, share in enumerate(itertools.islice(ladder(*MACS), limit)):
        label = f"{number:04d}-{share:.4f}"
        try:
            model, _ = mtp.prune(
                copy.deepcopy(dense),
                mode=[("fastnas", widths)],
                constraints={"flops": f"{100 * share:.2f}%"},
                dummy_input=task.example_input(),
                config=settings,
            )
            prefer_channels_last(model, task.example_input(2))  # as everybody's recovery
            accuracy = problem.recover(model, number)
        except (ValueError, RuntimeError, FloatingPointError) as error:
            log.failed(label, error)
            continue
        log.finished(label, model, accuracy)


def _calibration(problem: PeerProblem) -> list[Tensor]:
    """Training images for batch norms, in as many batches as it wants."""
    task = problem.task
    size = max(2, min(BATCH, task.num_train // BATCHES))
    drawn = task.train_batches(problem.generator(0), max_images=size * BATCHES, augment=False)
    batches = torch.split(torch.cat([images for images, _ in drawn]), size)
    return list(itertools.islice(itertools.cycle(batches), BATCHES))
