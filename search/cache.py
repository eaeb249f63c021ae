"""Results that the trials of a run share: made once, stored by the content that they depend on.

Channel scores and sparse-trained weights cost seconds to hours; whichever trial asks first makes
them, one that asks meanwhile waits, later ones and resumed runs read them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load, save
from torch import Tensor

from .store import atomic_write_bytes

SHARED = "shared"  # the folder in the run folder
LEASE_S = 30.0  # a maker that is silent for so long is taken for dead


@dataclass(frozen=True)
class Made:
    """A shared result: tensors, and what is known of their making, as JSON values."""

    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any] = field(default_factory=dict)

    def pack(self) -> tuple[bytes, str]:
        """The tensors as safetensors, and the info as JSON."""
        return save({k: v.contiguous() for k, v in self.tensors.items()}), json.dumps(self.info)

    @classmethod
    def unpack(cls, tensors: bytes, info: str) -> Made:
        """Inverse of `pack`."""
        return cls(load(tensors), json.loads(info))


def address(key: Mapping[str, Any]) -> str:
    """Content address of a result: a readable kind and a digest of all that it depends on."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return f"{key['kind']}-{digest}"


def make_here(key: Mapping[str, Any], make: Callable[[], Made]) -> tuple[Made, float]:
    """Shares nothing: makes the result."""
    return make(), 0.0


class Cache:
    """Shared results in a folder, and who is making the missing ones.

    One process owns a folder's cache and serves the others. `KEY.json` is written after
    `KEY.safetensors`, so a result with its info is whole, whenever a writer died.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._leases: dict[str, tuple[str, float]] = {}

    def claim(
        self, key: str, owner: str
    ) -> tuple[Literal["ready"], tuple[bytes, str]] | tuple[Literal["make", "wait"], None]:
        """What `owner` is to do about `key`: read it, make it, or ask again soon.

        Args:
            key: From `address`.
            owner: Names the asking worker. It must `renew` its claim within `LEASE_S`.
        """
        info, tensors = self._paths(key)
        if info.exists() and tensors.exists():
            return "ready", (tensors.read_bytes(), info.read_text())
        holder, until = self._leases.get(key, (owner, 0.0))
        if holder != owner and time.monotonic() < until:
            return "wait", None
        self.renew(key, owner)
        return "make", None

    def renew(self, key: str, owner: str) -> None:
        """Says that `owner` is still at work on `key`."""
        self._leases[key] = (owner, time.monotonic() + LEASE_S)

    def put(self, key: str, tensors: bytes, info: str) -> None:
        """Stores a result and ends its claim."""
        paths = self._paths(key)
        atomic_write_bytes(paths[1], tensors)
        atomic_write_bytes(paths[0], info.encode())
        self._leases.pop(key, None)

    def release(self, key: str, owner: str) -> None:
        """Ends a claim without a result: the next that asks may try."""
        if self._leases.get(key, ("", 0.0))[0] == owner:
            del self._leases[key]

    def _paths(self, key: str) -> tuple[Path, Path]:
        return self._folder / f"{key}.json", self._folder / f"{key}.safetensors"
