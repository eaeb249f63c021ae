"""The actor that writes into the run folder, and serves what trials share.

It starts at once: it needs no torch.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from . import cluster  # noqa: F401  # first: it sets Ray's environment

# isort: split
import ray

from .cache import SHARED, Cache, Shared, sharing
from .deaths import Place
from .store import RUNGS, atomic_write_bytes


class Keeper(Cache):
    """Writes what trials leave behind into the run folder, on the driver's node.

    Args:
        run_dir: The run folder.
        user: The folder of results that other runs share; None where they do not.
        max_bytes: What that folder may hold.
    """

    def __init__(self, run_dir: str, user: str | None = None, max_bytes: float = math.inf) -> None:
        super().__init__(Path(run_dir) / SHARED, Path(user) if user else None, max_bytes)
        self._run_dir = Path(run_dir)
        self._places: dict[str, Place] = {}

    def began(self, trial_id: str, place: Place) -> None:
        """Remembers where a trial runs, so that its worker's log can be found if it dies."""
        self._places[trial_id] = place

    def place(self, trial_id: str) -> Place | None:
        """Where a trial ran last; None if this actor has died since."""
        return self._places.get(trial_id)

    def keep(self, trial_id: str, recipe: str, weights: bytes) -> tuple[str, str]:
        """Stores both files atomically and returns their paths in the run folder."""
        paths = f"recipes/{trial_id}.json", f"weights/{trial_id}.safetensors"
        atomic_write_bytes(self._run_dir / paths[0], recipe.encode())
        atomic_write_bytes(self._run_dir / paths[1], weights)
        return paths

    def pause(self, trial_id: str, recipe: str, tensors: bytes) -> None:
        """Stores where a trial waits; the recipe is the same each time, so no pair is mixed."""
        paths = self._paused_paths(trial_id)
        atomic_write_bytes(paths[0], recipe.encode())
        atomic_write_bytes(paths[1], tensors)

    def paused(self, trial_id: str) -> tuple[str, bytes] | None:
        """Where a trial waits; None if it is not known."""
        paths = self._paused_paths(trial_id)
        if not all(path.exists() for path in paths):
            return None
        return paths[0].read_text(), paths[1].read_bytes()

    def _paused_paths(self, trial_id: str) -> tuple[Path, Path]:
        folder = self._run_dir / RUNGS
        return folder / f"{trial_id}.json", folder / f"{trial_id}.safetensors"


def shares(keeper: Any) -> Shared:
    """Trials' access to the run's cache, which the keeper owns."""
    return sharing(lambda method, *arguments: ray.get(getattr(keeper, method).remote(*arguments)))
