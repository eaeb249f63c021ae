"""Says how a run is going: a live panel on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

from .front import front_hypervolume
from .records import TrialResult, TrialStatus

if TYPE_CHECKING:
    from .coordinator import Coordinator

LINE_EVERY_S = 5.0


class Progress:
    """Receives what happens in a run and shows it on `console` (None: shows nothing)."""

    def __init__(self, console: Console | None) -> None:
        self._console = console
        self._coordinator: Coordinator | None = None
        self._live: Live | None = None
        self._running = 0
        self._started = self._last_line = time.monotonic()
        self._before = 0

    @classmethod
    def silent(cls) -> Progress:
        """Shows nothing."""
        return cls(None)

    def say(self, message: str) -> None:
        """Prints one line."""
        if self._console is not None:
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def live(self, coordinator: Coordinator) -> Iterator[None]:
        """Follows the trials of `coordinator` until the block ends."""
        self._coordinator = coordinator
        self._started = self._last_line = time.monotonic()
        self._before = len(coordinator.results)
        if self._console is None or not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as self._live:
            self._refresh()
            yield
        self._live = None

    def running(self, count: int) -> None:
        """Reports how many trials run now; called often."""
        if count != self._running:
            self._running = count
            self._refresh()

    def finished(self, result: TrialResult) -> None:
        """Reports one finished trial."""
        if self._live is not None:
            self._refresh()
            return
        if result.status == TrialStatus.FAILED:
            self.say(f"{result.trial_id} failed: {result.message}")
        now = time.monotonic()
        last = self._coordinator is not None and not self._coordinator.remaining
        if now - self._last_line >= LINE_EVERY_S or (last and self._running <= 1):
            self._last_line = now
            self.say(" | ".join(f"{k} {v}" for k, v in self._facts().items()))

    def _refresh(self) -> None:
        if self._live is None:
            return
        table = Table.grid(padding=(0, 2))
        for name, value in self._facts().items():
            table.add_row(f"[dim]{name}", value)
        self._live.update(table, refresh=True)

    def _facts(self) -> dict[str, str]:
        assert self._coordinator is not None
        results = list(self._coordinator.results.values())
        config = self._coordinator.config
        count = collections.Counter(result.status for result in results)
        others = [f"{count[s]} {s}" for s in TrialStatus if count[s] and s != "completed"]
        state = [f"{self._running} running", *others]
        volume = front_hypervolume(results, asdict(self._coordinator.baseline), config.objectives)
        return {
            "trials": f"{len(results)}/{config.search.trials} ({', '.join(state)})",
            "front": f"{len(self._coordinator.front)} members, hypervolume {volume:.4f}",
            "best": self._best(),
            "time left": self._time_left(len(results), config.search.trials),
        }

    def _best(self) -> str:
        assert self._coordinator is not None
        front = self._coordinator.front
        fast = max((r.speedup or 0.0 for r in front), default=0.0)
        close = [r.speedup or 0.0 for r in front if (r.accuracy_drop or 0.0) <= 0.01]
        near = f", {max(close):.2f}x within 0.01 of dense" if close else ""
        return f"{fast:.2f}x fastest{near}" if front else "none yet"

    def _time_left(self, done: int, total: int) -> str:
        new = done - self._before
        if new < 2:
            return "unknown yet"
        seconds = (time.monotonic() - self._started) / new * (total - done)
        return f"about {seconds:.0f} s" if seconds < 120 else f"about {seconds / 60:.0f} min"
