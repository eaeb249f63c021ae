"""Decides what runs next and records how it ended; the driver's only state. Knows no Ray.

The ledger (`Store`) is the truth. A finished trial is stored first, then told to the sampler; a
coordinator that is made anew from the ledger proposes exactly the trials that are missing.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from .asking import AskAhead
from .config import SearchConfig
from .context import TrialSpec, only_evaluates
from .dense import Baseline
from .early_stop import fidelities, ladder_of
from .front import Front, reference_point
from .plateau import Plateau, has_ended
from .records import TrialResult, TrialStatus
from .rows import candidate_json, duplicate_row, failed_row, proposal_of, trial_id
from .sampler import Proposal, Sampler, trial_seed
from .seeds import Seed, default_seeds
from .space import Space
from .store import RUNGS, LedgerError, Store
from .surrogate.features import Hints

COMPACT_EVERY = 256
HOPELESS = 8  # trials that fail before any succeeds: the cause is not the candidate
MOST_READY = 4  # trials that wait for room of their kind: those asked early know less
POLL_S = 0.05  # the driver waits for the sampler no longer while trials run

Listener = Callable[[TrialResult], None]


class _Running(NamedTuple):
    proposal: Proposal
    spec: TrialSpec


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
        hints: Hints | None = None,
    ) -> None:
        self.config = config
        self._run_dir = run_dir
        self._listener = listener
        self.store = Store(run_dir)
        self.baseline = baseline
        if seeds is None:
            seeds = default_seeds(space, config)
        sampler = Sampler(space, config, seeds, dataclasses.asdict(baseline), hints)
        self.results: dict[str, TrialResult] = {}
        self.counts: collections.Counter[TrialStatus] = collections.Counter()
        self._by_candidate: dict[str, str] = {}
        self._running: dict[str, _Running] = {}
        self._ready: collections.deque[TrialSpec] = collections.deque()  # to be started
        self._deaths: dict[str, list[str]] = {}  # of each trial's workers, while it is tried again
        self._unstored: dict[str, TrialResult] = {}
        self._duplicates: dict[str, list[Proposal]] = {}  # of each trial
        self._written = 0
        reference = reference_point(dataclasses.asdict(baseline), config.objectives)
        self._front = Front(config.objectives, reference)
        self._plateau = Plateau(config.search)
        known = self.store.read()
        self._rungs = fidelities(config)
        self._ladder = ladder_of(config, known)
        self._restore(known, sampler)
        missing = [n for n in range(config.search.trials) if trial_id(n) not in self.results]
        self._asking = AskAhead(sampler, config, missing)
        self._deadline = _deadline(config)
        self._stop_reason: str | None = None
        self._broken: str | None = None
        self._abandoned = False
        self._failures, self._last_failure = 0, ""  # of this session: a resume tries again
        self._clean_up()

    @property
    def front(self) -> list[TrialResult]:
        """The non-dominated completed trials, the best in the second objective first."""
        return self._front.members

    @property
    def hypervolume(self) -> float:
        """Hypervolume of the front, against the run's fixed reference point."""
        return self._front.hypervolume

    @property
    def remaining(self) -> int:
        """Trials that were not yet proposed."""
        return self._asking.remaining

    @property
    def num_promotable(self) -> int:
        """Trials that wait at a lower fidelity and are to go on."""
        return self._ladder.num_promotable

    @property
    def done(self) -> bool:
        """True when nothing more will start.

        A trial that runs may yet make one promotable, or need another attempt.
        """
        if self._waiting:
            return self.stopped is not None
        may_yet = len(self._rungs) > 1 or self.config.resources.max_retries > 0
        return not (may_yet and self._running)

    @property
    def stopped(self) -> str | None:
        """Why nothing more starts although trials remain; None while it does."""
        if not self._waiting:
            return None
        if self._stop_reason is not None:
            return self._stop_reason
        in_vain = self.counts[TrialStatus.FAILED] + self.counts[TrialStatus.DUPLICATE]
        if self._failures >= HOPELESS and in_vain == len(self.results):
            return f"all trials fail, the last one with: {self._last_failure}"
        if self._deadline is not None and time.monotonic() > self._deadline:
            return "the time is over (search.time_limit_s)"
        return self._plateau.reached

    def stop(self, reason: str) -> None:
        """Starts nothing more; what runs goes on to its next rung."""
        self._stop_reason = reason

    def abandon(self, reason: str) -> None:
        """Starts nothing more and writes nothing more: another driver has the run folder now."""
        self._abandoned = True
        self.stop(reason)

    def break_off(self, reason: str, trial: str | None = None) -> None:
        """Starts nothing more: the machine is at fault, not a trial. `resume` goes on.

        Args:
            reason: What is wrong.
            trial: The trial that it hit, to be run again; no row says that it failed.
        """
        self._broken = self._stop_reason = reason
        if trial is not None:
            self._ready.append(self._running[trial].spec)

    def expect(self, slots: int) -> None:
        """Says how many trials will run at a time, so that as many proposals lie ready."""
        self._asking.expect(slots)

    def next(self, *, train: bool = True, evaluate: bool = True) -> TrialSpec | None:
        """The next trial to run; None when there is none now.

        A trial that is tried again or promoted comes before a new one. A candidate that is already
        known is not run again: its row is recorded as a duplicate, at once or when the first one
        ends.

        Args:
            train: Whether there is room for a trial that trains.
            evaluate: Whether there is room for one that only evaluates.
        """
        if not (train or evaluate) or self.stopped is not None:
            return None
        if (spec := self._take_ready(train, evaluate)) is not None:
            return spec
        if train and (promotion := self._ladder.promote()) is not None:
            return self._promoted(*promotion)
        while self.remaining and self.stopped is None and len(self._ready) < MOST_READY:
            proposal = self._asking.next(POLL_S if self._running else 1.0)
            if proposal is None:
                if self._running:
                    return None
                continue  # nothing else is to be done, and Tune would sleep for a second
            key = proposal.candidate.key
            first = self._by_candidate.setdefault(key, trial_id(proposal.number))
            if first == trial_id(proposal.number):
                self._ready.append(self._start(proposal))
                if (spec := self._take_ready(train, evaluate)) is not None:
                    return spec
                continue
            self._duplicates.setdefault(first, []).append(proposal)
            if first in self.results:
                self._record(proposal, duplicate_row(proposal, self.results[first]))
        return None

    def finish(self, result: TrialResult) -> None:
        """Records how far a trial came, and its duplicates with it."""
        proposal, _ = self._running.pop(result.trial_id)
        if deaths := self._deaths.pop(result.trial_id, None):
            attempts = f"attempt {len(deaths) + 1}, after: {'; '.join(dict.fromkeys(deaths))}"
            result.message = "; ".join(filter(None, [result.message, attempts]))
        if result.status is TrialStatus.FAILED:
            self._failures, self._last_failure = self._failures + 1, result.message
        self._ladder.report(result)
        self._record(proposal, result)
        for duplicate in self._duplicates.get(result.trial_id, []):
            self._record(duplicate, duplicate_row(duplicate, result))
        if self.remaining and self.stopped is None and not self.num_promotable:
            self._asking.prepare()  # at once, so that the freed worker does not wait for it

    def fail(self, trial: str, message: str, *, again: bool = False) -> None:
        """Records a trial whose worker could not say itself how it ended.

        Args:
            trial: Its name.
            message: How it ended.
            again: Whether another attempt may end otherwise; then it gets one instead, as long as
                `resources.max_retries` admits.
        """
        spec = self._running[trial].spec
        if again and len(self._deaths.get(trial, ())) < self.config.resources.max_retries:
            self._deaths.setdefault(trial, []).append(message)
            self._ready.append(spec)
            return
        self.finish(failed_row(spec, self.results.get(trial), message))

    def close(self) -> None:
        """Ends the sampler's thread and leaves the ledger compact, with the front marked.

        Raises:
            LedgerError: If the search was broken off.
        """
        self._asking.close()
        if self._abandoned:
            return
        on_front = {member.trial_id for member in self.front}
        for result in self.results.values():
            result.on_front = result.trial_id in on_front
        try:
            for trial in list(self._unstored):
                self.store.write_trial(self._unstored.pop(trial))
            self.store.compact(on_front)
            self._sweep()
            self.store.write_front(self.front)
        except OSError as error:
            self._broken = f"{self._run_dir} cannot be written: {error.strerror or error}"
        if self._broken is not None:
            raise LedgerError(self._broken)

    @property
    def _waiting(self) -> bool:
        """Whether anything is left to start."""
        return bool(self.remaining or self.num_promotable or self._ready)

    def _take_ready(self, train: bool, evaluate: bool) -> TrialSpec | None:
        """The first of the trials that are ready to start for which there is room."""
        for spec in self._ready:
            if evaluate if only_evaluates(spec, self.config) else train:
                self._ready.remove(spec)
                return spec
        return None

    def _start(self, proposal: Proposal) -> TrialSpec:
        spec = TrialSpec(
            trial_id=trial_id(proposal.number),
            candidate=proposal.candidate,
            candidate_json=candidate_json(proposal),
            seed=trial_seed(self.config.search.seed, proposal.number),
            fidelity=self._rungs[0],
        )
        self._running[spec.trial_id] = _Running(proposal, spec)
        return spec

    def _promoted(self, trial: str, fidelity: int) -> TrialSpec:
        row = self.results[trial]
        proposal = proposal_of(row)
        spec = TrialSpec(trial, proposal.candidate, row.candidate, row.seed, fidelity, row)
        self._running[trial] = _Running(proposal, spec)
        return spec

    # --- recording --------------------------------------------------------------------------

    def _record(self, proposal: Proposal, result: TrialResult) -> None:
        if self._abandoned:
            return  # the other driver runs the trial too: its row must not be replaced
        before = {member.trial_id for member in self.front}
        changed = self._keep(result)
        result.on_front = changed
        self._write(result)
        self._asking.tell(proposal, result)
        if result.trial_id not in self._unstored:
            self._tidy_up(result, before, changed)
        self._listener(result)

    def _write(self, result: TrialResult) -> None:
        """Stores a row; one that cannot be stored breaks the search off, and is stored then."""
        try:
            self.store.write_trial(result)
            self._unstored.pop(result.trial_id, None)
        except OSError as error:
            self._unstored[result.trial_id] = result
            self.break_off(f"{self._run_dir} cannot be written: {error.strerror or error}")

    def _tidy_up(self, result: TrialResult, before: set[str], changed: bool) -> None:
        """Brings the other files up to date with a row; after a crash it is done at the start."""
        try:
            if changed:
                self.store.write_front(self.front)
            self._drop_artifacts(before | {result.trial_id})
            self._written += 1
            if self._written % COMPACT_EVERY == 0:
                self.store.compact(new_only=True)
            if result.status is not TrialStatus.EARLY_STOPPED:
                self._forget(result.trial_id)
        except OSError as error:
            self.break_off(f"{self._run_dir} cannot be written: {error.strerror or error}")

    def _forget(self, trial: str) -> None:
        """Deletes the checkpoint of a trial that waits no more."""
        for ending in ("json", "safetensors"):
            (self._run_dir / RUNGS / f"{trial}.{ending}").unlink(missing_ok=True)

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
        """Deletes what a killed trial left, and checkpoints of trials that will not go on."""
        over = not (self.remaining or self.num_promotable or self._running)
        for path in (self._run_dir / RUNGS).glob("t*.*"):
            row = self.results.get(path.stem)
            if over or row is None or row.status is not TrialStatus.EARLY_STOPPED:
                path.unlink(missing_ok=True)
        kept = {path for member in self.front for path in (member.recipe, member.weights)}
        for pattern in ("recipes/t*.json", "weights/t*.safetensors"):
            for path in self._run_dir.glob(pattern):
                if path.relative_to(self._run_dir).as_posix() not in kept:
                    path.unlink(missing_ok=True)

    def _keep(self, result: TrialResult) -> bool:
        """Adds a result to what is known; True if the front is another one now."""
        before = self.results.get(result.trial_id)
        self.results[result.trial_id] = result
        self.counts[result.status] += 1
        changed = self._front.add(result)
        if before is not None:
            self.counts[before.status] -= 1
        if has_ended(result) and not (before is not None and has_ended(before)):
            self._plateau.add(self._front.hypervolume)
        return changed

    def _clean_up(self) -> None:
        self._drop_artifacts(set(self.results))
        self._sweep()
        if self.results:
            self.store.write_front(self.front)

    def _restore(self, results: Sequence[TrialResult], sampler: Sampler) -> None:
        for result in sorted(results, key=lambda r: (r.finished_at or 0.0, r.trial_id)):
            self._keep(result)
        proposals = {trial: proposal_of(self.results[trial]) for trial in sorted(self.results)}
        for trial, proposal in proposals.items():
            if self.results[trial].status is not TrialStatus.DUPLICATE:
                self._by_candidate.setdefault(proposal.candidate.key, trial)
        for trial, proposal in proposals.items():
            if self.results[trial].status is TrialStatus.DUPLICATE:
                first = self._by_candidate.get(proposal.candidate.key, trial)
                self._duplicates.setdefault(first, []).append(proposal)
                if first != trial:
                    self._renew(self.results[trial], duplicate_row(proposal, self.results[first]))
        for trial, proposal in proposals.items():
            sampler.restore(proposal, self.results[trial])

    def _renew(self, row: TrialResult, now: TrialResult) -> None:
        """Stores a duplicate again where its first trial went on just before a crash."""
        if (row.fidelity, row.message) != (now.fidelity, now.message):
            self.store.write_trial(now)
            self._keep(now)


def _deadline(config: SearchConfig) -> float | None:
    limit = config.search.time_limit_s
    return None if limit is None else time.monotonic() + limit
