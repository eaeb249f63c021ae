"""How a run went: its state, hypervolume over trials and seconds, failures, time spent."""

from __future__ import annotations

import collections
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..early_stop import ladder_of
from ..front import Front, reference_point
from ..locks import LOCK, SILENT_S, FileSign, Owner, in_use
from ..records import TrialResult, TrialStatus
from ..remote import Remote, is_uri
from ..runs import Run
from ..tables import PARTS, TRIAL_PARTS
from .columns import number

STATES = {
    "finished": "Finished",
    "running": "Running",
    "stopped": "Stopped before its end",
    "empty": "No trial has ended yet",
    "failed": "Every trial failed",
}
MOST_CAUSES = 50
MOST_EXAMPLES = 5
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+(?:\.\d+)?(?:e[+-]?\d+)?", re.IGNORECASE)


def state_of(run: Run, results: Sequence[TrialResult]) -> dict[str, Any]:
    """How far the run is: `name` (of `STATES`), `label`, `finished`, `waiting`, `trials`."""
    config = run.config
    waiting = ladder_of(config, results).num_promotable
    wanted = config.search.trials
    if is_driven(run):
        name = "running"
    elif not results:
        name = "empty"
    elif all(r.status in (TrialStatus.FAILED, TrialStatus.DUPLICATE) for r in results):
        name = "failed"
    else:
        name = "finished" if len(results) >= wanted and not waiting else "stopped"
    return {
        "name": name,
        "label": STATES[name],
        "trials": wanted,
        "finished": len(results),
        "waiting": waiting,
        "by_status": dict(collections.Counter(str(r.status) for r in results)),
    }


def is_driven(run: Run) -> bool:
    """Whether a driver has the run now, as far as this machine can tell.

    On other machines it is one that has given a sign of life of late.
    """
    if in_use(run.folder):
        return True
    if is_uri(run.place):
        remote = Remote(run.place)
        stamp = remote.stamp(LOCK)
        if stamp is None or time.time() - stamp.second > SILENT_S:
            return False
        with suppress(FileNotFoundError):
            return Owner.parse(remote.read(LOCK)) is not None
        return False
    sign = FileSign(run.folder / LOCK)
    owner = Owner.parse(sign.read())
    if owner is None or owner.is_here:
        return False
    return time.time() - sign.path.stat().st_mtime < SILENT_S


def hypervolume_of(
    results: Sequence[TrialResult], baseline: Mapping[str, Any], objectives: Mapping[str, str]
) -> dict[str, Any] | None:
    """The front's hypervolume as trials ended.

    Returns:
        `trials`, `seconds` (since the first trial began) and `value`, one entry each time that it
        grew and one at the end; `reference`: the corner that it is measured from, by metric. None
        before the dense model is wholly measured, or where nothing ended.
    """
    ended = sorted(
        (r for r in results if r.finished_at is not None),
        key=lambda r: (r.finished_at or 0.0, r.trial_id),
    )
    try:
        corner = reference_point(baseline, objectives)
    except (KeyError, TypeError):  # the dense model is not (wholly) measured
        return None
    if not ended:
        return None
    start = min(r.started_at or r.finished_at or 0.0 for r in ended)
    front = Front(objectives, corner)
    points = []
    for count, result in enumerate(ended, 1):
        if front.add(result) or count == len(ended):
            points.append((count, (result.finished_at or 0.0) - start, front.hypervolume))
    return {
        "trials": [count for count, _, _ in points],
        "seconds": [number(seconds) for _, seconds, _ in points],
        "value": [number(value, 12) for _, _, value in points],
        "reference": dict(zip(objectives, map(number, corner), strict=True)),
    }


def failures_of(results: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """Failed and infeasible trials by cause, the most frequent first.

    Messages that differ in their numbers alone are one cause.

    Returns:
        Of each: `status`, `cause` (the most frequent wording), `count`, `trials` (the first few).
    """
    causes: dict[tuple[str, str], list[TrialResult]] = {}
    for result in results:
        if result.status in (TrialStatus.FAILED, TrialStatus.INFEASIBLE):
            key = _NUMBER.sub("#", _cause(result))
            causes.setdefault((str(result.status), key), []).append(result)
    rows: list[dict[str, Any]] = [
        {
            "status": status,
            "cause": collections.Counter(map(_cause, group)).most_common(1)[0][0],
            "count": len(group),
            "trials": [r.trial_id for r in group[:MOST_EXAMPLES]],
        }
        for (status, _), group in causes.items()
    ]
    return sorted(rows, key=lambda row: -row["count"])[:MOST_CAUSES]


def times_of(run: Run, results: Sequence[TrialResult]) -> dict[str, Any]:
    """Where the time went, in seconds.

    Returns:
        `parts`: of the run's wall clock, over all its sessions; `trial_parts`: inside trials, over
        all workers; `by_status`: inside trials by how they ended, with their number.
    """
    spent = {part: sum(float(getattr(r, part)) for r in results) for part in TRIAL_PARTS}
    by_status: dict[str, list[float]] = {}
    for r in results:
        seconds = sum(float(getattr(r, part)) for part in TRIAL_PARTS)
        by_status.setdefault(str(r.status), []).append(seconds)
    known = run.times
    return {
        "parts": [
            {"name": part, "label": label, "seconds": number(known[part])}
            for part, label in PARTS.items()
            if part in known
        ],
        "trial_parts": [
            {"name": part, "label": label, "seconds": number(spent[part])}
            for part, label in TRIAL_PARTS.items()
        ],
        "by_status": [
            {"status": status, "trials": len(each), "seconds": number(sum(each))}
            for status, each in by_status.items()
        ],
    }


def _cause(result: TrialResult) -> str:
    """The message without what differs from trial to trial."""
    text = result.message or "no reason given"
    if result.status is TrialStatus.INFEASIBLE:
        parts = [part.partition(" by ")[0] for part in text.split("; ")]
        text = "; ".join(part for part in parts if not part.startswith("reused: "))
    return text[:300]
