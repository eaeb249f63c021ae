"""Asks the sampler ahead of need, in a thread of its own.

With one slot nothing is asked ahead: a trial is asked when all before it were told, so that a
seed gives one search. With more, a few proposals lie ready for the next free slots; where the
sampler is too slow even so, a random candidate steps in and its row says so.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from .config import SearchConfig
from .records import TrialResult
from .sampler import Proposal, Sampler

SLOTS_A_PROPOSAL = 8  # for so many slots one lies ready: what is asked early knows less


class AskAhead:
    """Hands out proposals and passes on how they ended."""

    def __init__(self, sampler: Sampler, config: SearchConfig, numbers: Iterable[int]) -> None:
        """Asks nothing yet.

        Args:
            sampler: Is asked and told.
            config: Its `search.ask_timeout_s` says when.
            numbers: The trials to propose, in this order.
        """
        self._sampler = sampler
        self._config = config
        self._numbers = deque(numbers)
        self._ready: deque[Proposal] = deque()
        self._ahead = self._wanted = 0
        self._in_thought = 0
        self._busy = False
        self._failure: Future[None] | None = None
        self._hungry_since: float | None = None
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sampler")

    @property
    def remaining(self) -> int:
        """Trials that were not handed out yet."""
        with self._changed:
            return len(self._numbers) + len(self._ready) + self._in_thought

    def expect(self, slots: int) -> None:
        """Says how many trials will run at a time."""
        self._ahead = 0 if slots == 1 else math.ceil(slots / SLOTS_A_PROPOSAL)

    def next(self, wait_s: float) -> Proposal | None:
        """The next proposal; None if there is none within `wait_s` seconds."""
        self.prepare()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or not self._busy, wait_s)
            proposal = self._ready.popleft() if self._ready else None
        if proposal is None:
            self._raise_failure()
            proposal = self._substitute()
        if proposal is not None:
            self._hungry_since = None
            self._think(self._ahead)
        return proposal

    def prepare(self) -> None:
        """Begins to ask for a slot that is free, or soon will be."""
        self._raise_failure()
        self._think(self._ahead + 1)

    def tell(self, proposal: Proposal, result: TrialResult) -> None:
        """Reports how a proposal ended; the sampler knows before it is asked again."""
        self._sampler.tell(proposal.number, result)

    def close(self) -> None:
        """Asks no more; waits for the question that is open."""
        with self._changed:
            self._wanted = 0
        self._pool.shutdown(wait=True, cancel_futures=True)

    # --- in the driver's thread ---------------------------------------------------------------

    def _think(self, wanted: int) -> None:
        with self._changed:
            self._wanted = wanted
            if self._busy or (self._failure is not None and self._failure.exception()):
                return  # a failure is to be raised, not to be replaced by another question
            if self._numbers and len(self._ready) < wanted:
                self._busy = True
                self._failure = self._pool.submit(self._fill)

    def _raise_failure(self) -> None:
        """Raises what the sampler raised; an error must not look like a slow sampler."""
        if not self._busy and self._failure is not None:
            self._failure.result()

    def _substitute(self) -> Proposal | None:
        limit_s = self._config.search.ask_timeout_s
        now = time.monotonic()
        self._hungry_since = self._hungry_since or now
        if not self._ahead or limit_s is None or now - self._hungry_since < limit_s:
            return None
        with self._changed:
            if not self._numbers:
                return None
            number = self._numbers.popleft()
        return self._sampler.ask_cheap(number)

    # --- in the sampler's thread --------------------------------------------------------------

    def _fill(self) -> None:
        while (number := self._claim()) is not None:
            try:
                proposal = self._sampler.ask(number)
            except BaseException:
                with self._changed:
                    self._numbers.appendleft(number)
                    self._in_thought = 0
                    self._busy = False
                    self._changed.notify_all()
                raise
            with self._changed:
                self._in_thought = 0
                self._ready.append(proposal)
                self._changed.notify_all()

    def _claim(self) -> int | None:
        """The number to ask next; None, and the thread ends, when enough lie ready."""
        with self._changed:
            if len(self._ready) >= self._wanted or not self._numbers:
                self._busy = False
                return None
            self._in_thought = 1
            return self._numbers.popleft()
