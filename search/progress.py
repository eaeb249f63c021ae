"""Says how a run is going: a live panel on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

from .records import TrialResult, TrialStatus
from .yaml_source import printable

if TYPE_CHECKING:
    from .coordinator import Coordinator

LINE_EVERY_S = 5.0
REFRESH_EVERY_S = 0.1


class Progress:
    """Receives what happens in a run and shows it on `console` (None: shows nothing)."""

    def __init__(self, console: Console | None) -> None:
        self._console = console
        self._coordinator: Coordinator | None = None
        self._live: Live | None = None
        self._running = 0
        self._started = self._last_line = self._last_refresh = time.monotonic()
        self._before = self._jobs = 0
        self._stop_told = False

    @classmethod
    def silent(cls) -> Progress:
        """Shows nothing."""
        return cls(None)

    def say(self, message: str) -> None:
        """Prints one line."""
        if self._console is not None:
            self._console.print(printable(message), markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def live(self, coordinator: Coordinator) -> Iterator[None]:
        """Follows the trials of `coordinator` until the block ends."""
        self._coordinator = coordinator
        self._started = self._last_line = time.monotonic()
        self._before, self._jobs = len(coordinator.results), 0
        self._tell_stop()
        if self._console is None or not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as self._live:
            self._refresh()
            yield
            self._refresh()
        self._live = None

    def running(self, count: int) -> None:
        """Reports how many trials run now; called often."""
        self._tell_stop()
        if count != self._running:
            self._running = count
            self._refresh_soon()

    def finished(self, result: TrialResult) -> None:
        """Reports one trial that has ended, or waits at a lower fidelity."""
        self._jobs += 1
        self._tell_stop()
        if self._live is not None:
            self._refresh_soon()
            return
        if result.status == TrialStatus.FAILED:
            self.say(f"{result.trial_id} failed: {result.message}")
        now = time.monotonic()
        last = self._coordinator is not None and self._coordinator.done
        if now - self._last_line >= LINE_EVERY_S or (last and self._running <= 1):
            self._last_line = now
            self.say(" | ".join(f"{k} {v}" for k, v in self._facts().items()))

    def _tell_stop(self) -> None:
        reason = self._coordinator.stopped if self._coordinator is not None else None
        if reason is not None and not self._stop_told:
            self._stop_told = True
            self.say(f"no more trials start: {reason}")

    def _refresh_soon(self) -> None:
        """Draws at most so often that the drawing costs little, however quick the trials are."""
        if time.monotonic() - self._last_refresh >= REFRESH_EVERY_S:
            self._refresh()

    def _refresh(self) -> None:
        if self._live is None:
            return
        self._last_refresh = time.monotonic()
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column()
        for name, value in self._facts().items():
            table.add_row(name, value)
        self._live.update(table, refresh=True)

    def _facts(self) -> dict[str, str]:
        assert self._coordinator is not None
        coordinator = self._coordinator
        done, total = len(coordinator.results), coordinator.config.search.trials
        count = coordinator.counts
        others = [f"{count[s]} {s}" for s in TrialStatus if count[s] and s != "completed"]
        state = [f"{self._running} running", *others]
        volume = coordinator.hypervolume
        return {
            "trials": f"{done}/{total} ({', '.join(state)})",
            "front": f"{len(coordinator.front)} members, hypervolume {volume:.4f}",
            "best": self._best(),
            "time left": self._time_left(done, total),
        }

    def _best(self) -> str:
        assert self._coordinator is not None
        front = self._coordinator.front
        fast = max((r.speedup or 0.0 for r in front), default=0.0)
        close = [r.speedup or 0.0 for r in front if (r.accuracy_drop or 0.0) <= 0.01]
        near = f", {max(close):.2f}x within 0.01 of dense" if close else ""
        return f"{fast:.2f}x fastest{near}" if front else "none yet"

    def _time_left(self, done: int, total: int) -> str:
        assert self._coordinator is not None
        if self._coordinator.stopped:
            return "the running trials'"
        new = done - self._before
        if min(new, self._jobs) < 2:
            return "unknown yet"
        spent, waiting = time.monotonic() - self._started, self._coordinator.num_promotable
        seconds = spent / new * (total - done) + spent / self._jobs * waiting
        return f"about {seconds:.0f} s" if seconds < 120 else f"about {seconds / 60:.0f} min"
