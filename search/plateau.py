"""The budget by hypervolume: a search whose front no longer grows stops."""

from __future__ import annotations

from collections import deque

from .config import SamplerConfig
from .records import TrialResult, TrialStatus


def has_ended(result: TrialResult) -> bool:
    """Whether a trial counts: it neither waits at a rung nor repeats another one."""
    return result.status not in (TrialStatus.EARLY_STOPPED, TrialStatus.DUPLICATE)


class Plateau:
    """Follows the front's hypervolume from trial to trial, in the order in which they ended."""

    def __init__(self, search: SamplerConfig) -> None:
        """Has seen no trial; without `plateau_trials` it never stops anything."""
        self._search = search
        self._seen = 0
        self._volumes: deque[float] = deque(maxlen=(search.plateau_trials or 0) + 1)
        self.reached: str | None = None

    def add(self, hypervolume: float) -> None:
        """Takes the hypervolume after one more trial; once reached, a plateau stays reached."""
        search = self._search
        self._seen += 1
        if search.plateau_trials is None or self.reached or self._seen < search.plateau_after:
            return
        self._volumes.append(hypervolume)
        first = self._volumes[0]
        full = len(self._volumes) == search.plateau_trials + 1
        if full and 0 < hypervolume <= first * (1 + search.plateau_gain):
            self.reached = (
                f"the front's hypervolume grew by no more than {search.plateau_gain:.2%} over "
                f"{search.plateau_trials} trials (search.plateau_trials)"
            )
