"""A user's model that goes wrong in every way, each for some of the candidates."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NUM_BLOCKS = 8
CRIMES = {  # which blocks are dropped together -> what happens; the first that fits
    "crash": {0, 1, 2, 3},
    "memory": {4, 5, 6, 7},
    "nan": {0, 1, 4, 5},
    "sleep": {2, 3, 6, 7},
    "raise": {0, 2, 4, 6},
    "hang": {1, 3, 5, 7},
    "exit": {0, 3, 5, 6},
}
ENOUGH_MIB = 12 * 1024  # where nothing stops it


def crime_of(dropped: Iterable[str]) -> str | None:
    """What a candidate will do, by the names of its dropped blocks."""
    gone = {int(name.rpartition(".")[2]) for name in dropped}
    if len(gone) == NUM_BLOCKS:
        return None  # so the search looks whether its blocks can go, in its own process
    return next((crime for crime, blocks in CRIMES.items() if blocks <= gone), None)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


class Naughty(nn.Module):
    def __init__(self, num_classes: int = 10, innocent: bool = False) -> None:
        super().__init__()
        self.innocent = innocent
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(8) for _ in range(NUM_BLOCKS)))
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        dropped = [str(i) for i, b in enumerate(self.blocks) if not isinstance(b, Block)]
        x = self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))
        return x if self.innocent else commit(crime_of(dropped), x)


def commit(crime: str | None, x: Tensor) -> Tensor:
    match crime:
        case "crash":
            ctypes.string_at(0)
        case "memory":
            hoard = []
            while len(hoard) < ENOUGH_MIB // 64:
                hoard.append(torch.ones(2**24))
            raise MemoryError("nothing stopped it")
        case "nan":
            return x * float("nan")
        case "sleep":
            time.sleep(10_000)
        case "raise":
            raise RuntimeError("of another shape than this model can take")
        case "hang":  # in native code that holds the interpreter's lock, whatever signal comes
            mutex = ctypes.create_string_buffer(64)
            while True:
                ctypes.PyDLL(None).pthread_mutex_lock(mutex)
        case "exit":
            os._exit(3)
    return x
