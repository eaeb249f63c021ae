"""Decides what runs next and records how it ended; the driver's only state. Knows no Ray.

The ledger (`Store`) is the truth. A finished trial is stored first, then told to the sampler; a
coordinator that is made anew from the ledger proposes exactly the trials that are missing.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from .config import SearchConfig
from .context import TrialSpec
from .front import front_of
from .records import Candidate, TrialResult, TrialStatus
from .sampler import Proposal, Sampler, trial_seed
from .seeds import Seed, default_seeds
from .setup import Baseline
from .space import Space
from .store import Store
from .trial import with_provenance

COMPACT_EVERY = 256

Listener = Callable[[TrialResult], None]


def trial_id(number: int) -> str:
    """The ledger's name of trial `number`."""
    return f"t{number:05d}"


class Coordinator:
    """Proposes trials until the budget is spent, and records each one's end."""

    def __init__(
        self,
        config: SearchConfig,
        space: Space,
        baseline: Baseline,
        run_dir: Path,
        listener: Listener,
        seeds: Sequence[Seed] | None = None,
    ) -> None:
        self.config = config
        self._run_dir = run_dir
        self._listener = listener
        self.store = Store(run_dir)
        self.baseline = baseline
        if seeds is None:
            seeds = default_seeds(space, config)
        self._sampler = Sampler(space, config, seeds)
        self.results: dict[str, TrialResult] = {}
        self._by_candidate: dict[str, str] = {}
        self._running: dict[str, Proposal] = {}
        self._waiting: dict[str, list[Proposal]] = {}
        self._restore(self.store.read())
        self._missing = [n for n in range(config.search.trials) if trial_id(n) not in self.results]
        self._missing.reverse()
        self._asking: Future[Proposal] | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sampler")
        self._deadline = _deadline(config)
        self.front: list[TrialResult] = []
        self._update_front()

    @property
    def remaining(self) -> int:
        """Trials that were not yet proposed."""
        return len(self._missing) + (self._asking is not None)

    @property
    def done(self) -> bool:
        """True when nothing more will be proposed: the budget of trials or of time is spent."""
        over = self._deadline is not None and time.monotonic() > self._deadline
        return over or not self.remaining

    def next(self) -> TrialSpec | None:
        """The next trial to run; None when the sampler is still thinking or all are proposed.

        A candidate that is already known is not run again: its row is recorded as a duplicate,
        at once or when the first one ends.
        """
        while not self.done:
            proposal = self._ask()
            if proposal is None:
                return None
            key = proposal.candidate.key
            first = self._by_candidate.setdefault(key, trial_id(proposal.number))
            if first == trial_id(proposal.number):
                self._running[first] = proposal
                return TrialSpec(
                    trial_id=first,
                    candidate=proposal.candidate,
                    candidate_json=_candidate_json(proposal),
                    seed=trial_seed(self.config.search.seed, proposal.number),
                )
            if first in self.results:
                self._record(proposal, _duplicate(proposal, self.results[first]))
            else:
                self._waiting.setdefault(first, []).append(proposal)
        return None

    def finish(self, result: TrialResult) -> None:
        """Records a trial's end, and that of the duplicates that waited for it."""
        proposal = self._running.pop(result.trial_id)
        self._record(proposal, result)
        for waiting in self._waiting.pop(result.trial_id, []):
            self._record(waiting, _duplicate(waiting, result))
        if self._asking is None and not self.done:
            self._start_asking()  # ahead, so that the freed worker does not wait for the sampler

    def fail(self, trial: str, message: str) -> None:
        """Records a trial whose worker could not say itself how it ended."""
        proposal = self._running[trial]
        now = time.time()
        self.finish(
            TrialResult(
                trial_id=trial,
                status=TrialStatus.FAILED,
                message=message,
                criterion=proposal.candidate.criterion,
                candidate=_candidate_json(proposal),
                dropped_blocks=list(proposal.candidate.dropped_blocks),
                seed=trial_seed(self.config.search.seed, proposal.number),
                finished_at=now,
            )
        )

    def close(self) -> None:
        """Ends the sampler's thread and leaves the ledger compact, with the front marked."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        on_front = {member.trial_id for member in self.front}
        for result in self.results.values():
            result.on_front = result.trial_id in on_front
        self.store.compact(on_front)
        self._sweep()
        self.store.write_front(self.front)

    # --- asking -----------------------------------------------------------------------------

    def _ask(self) -> Proposal | None:
        """Asks in a thread of its own, so that a slow sampler never blocks the driver."""
        if self._asking is None:
            self._start_asking()
        assert self._asking is not None
        try:
            proposal = self._asking.result(timeout=0.2)
        except TimeoutError:
            return None
        self._asking = None
        return proposal

    def _start_asking(self) -> None:
        self._asking = self._pool.submit(self._sampler.ask, self._missing.pop())

    # --- recording --------------------------------------------------------------------------

    def _record(self, proposal: Proposal, result: TrialResult) -> None:
        self.results[result.trial_id] = result
        before = {member.trial_id for member in self.front}
        front = front_of(list(self.results.values()), self.config.objectives)
        result.on_front = any(member.trial_id == result.trial_id for member in front)
        self.store.write_trial(result)
        self._sampler.tell(proposal.number, result)
        self.front = front
        if {member.trial_id for member in front} != before:
            self.store.write_front(front)
        self._drop_artifacts(before | {result.trial_id})
        if len(self.results) % COMPACT_EVERY == 0:
            self.store.compact()
        self._listener(result)

    def _drop_artifacts(self, candidates: set[str]) -> None:
        """Takes members that left the front off it, and deletes their recipe and weights."""
        for trial in candidates - {member.trial_id for member in self.front}:
            result = self.results[trial]
            files = [path for path in (result.recipe, result.weights) if path is not None]
            if result.on_front or files:
                result.on_front, result.recipe, result.weights = False, None, None
                self.store.write_trial(result)  # first the row, so that it never names a lost file
            for path in files:
                (self._run_dir / path).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Deletes recipes and weights that no front member names: a killed trial's."""
        kept = {path for member in self.front for path in (member.recipe, member.weights)}
        for pattern in ("recipes/t*.json", "weights/t*.safetensors"):
            for path in self._run_dir.glob(pattern):
                if path.relative_to(self._run_dir).as_posix() not in kept:
                    path.unlink(missing_ok=True)

    def _update_front(self) -> None:
        self.front = front_of(list(self.results.values()), self.config.objectives)
        self._drop_artifacts(set(self.results))
        self._sweep()
        if self.results:
            self.store.write_front(self.front)

    def _restore(self, results: Sequence[TrialResult]) -> None:
        for result in sorted(results, key=lambda r: r.trial_id):
            proposal = _proposal(result)
            self.results[result.trial_id] = result
            self._sampler.restore(proposal, result)
            if result.status != TrialStatus.DUPLICATE:
                self._by_candidate.setdefault(proposal.candidate.key, result.trial_id)


def _candidate_json(proposal: Proposal) -> str:
    return with_provenance(proposal.candidate, proposal.provenance())


def _proposal(result: TrialResult) -> Proposal:
    data = json.loads(result.candidate)
    return Proposal(
        number=int(result.trial_id[1:]),
        candidate=Candidate.from_mapping(data),
        origin=data["origin"],
        params=data["params"],
        sampler_attrs=data["sampler_attrs"],
    )


def _duplicate(proposal: Proposal, first: TrialResult) -> TrialResult:
    """The row of a candidate that is the same as an earlier one: its result, no cost."""
    return dataclasses.replace(
        first,
        trial_id=trial_id(proposal.number),
        status=TrialStatus.DUPLICATE,
        message=f"same as {first.trial_id} ({first.status})",
        on_front=False,
        candidate=_candidate_json(proposal),
        score_s=0.0,
        prune_s=0.0,
        finetune_s=0.0,
        measure_s=0.0,
        wait_s=0.0,
        recipe=None,
        weights=None,
        started_at=time.time(),
        finished_at=time.time(),
    )


def _deadline(config: SearchConfig) -> float | None:
    limit = config.search.time_limit_s
    return None if limit is None else time.monotonic() + limit
