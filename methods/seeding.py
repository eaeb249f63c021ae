"""Randomness of code that draws from torch's global generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Seeds torch's global generators of the CPU and of the model's GPUs; puts them back.

    Args:
        model: Whose devices count.
        seed: Decides everything random inside.
    """
    devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
