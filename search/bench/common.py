"""What benchmarks share: a small real problem, torch threads, seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...methods.data import ImageData, load_data
from ...methods.models.build import build_model
from ...methods.tasks.classification import ClassificationTask

BATCH = 128  # the default of a task


def digits_problem(name: str, images: int) -> tuple[nn.Module, ClassificationTask]:
    """A fresh model and digits at 32 px with `images` calibration images."""
    torch.manual_seed(0)
    model = build_model(name, num_classes=10)
    data = load_data("digits", image_size=32)
    assert isinstance(data, ImageData)
    return model, ClassificationTask(data, batch_size=BATCH, calibration_size=images)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Sets the number of torch threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds_of(run: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def markdown_row(cells: Sequence[str]) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def spread(values: Sequence[float], digits: int) -> str:
    """Median and range."""
    low, median, high = (f"{f(values):.{digits}f}" for f in (min, statistics.median, max))
    return f"{median} ({low} to {high})"
