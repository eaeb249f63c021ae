"""What passes between the stages of a search: `Candidate`, `TrialStatus`, `TrialResult`."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Constraint


FULL_FIDELITY = 2  # the whole trial budget (rung 2 of the fidelity ladder)


class TrialStatus(enum.StrEnum):
    """How a trial ended. Only `COMPLETED` trials can be on the front."""

    COMPLETED = "completed"
    FAILED = "failed"
    INFEASIBLE = "infeasible"
    EARLY_STOPPED = "early_stopped"
    DUPLICATE = "duplicate"


@dataclass(frozen=True)
class Candidate:
    """One point of the search space.

    Attributes:
        criterion: Name of the channel criterion; None when no channel is removed.
        dropped_blocks: Module names of the removed blocks, sorted.
        select: Selection rule (methods/select.py); None when no channel is removed.
        keep: Fraction of channels kept, by channel group (rule `ratio`), sorted by group.
        k: Fraction that is kept: of each group's total score (rule `cumulative`), of all channels
            together (`global`) or of the dense model's MACs (`macs`).
        dsd_lambda: Strength of the sparse training that comes first; None without one.
        dsd_q: Fraction of the channels that the sparse training drives to zero.
        dsd_epochs: Passes of the sparse training over the training images.
    """

    criterion: str | None = None
    dropped_blocks: tuple[str, ...] = ()
    select: str | None = None
    keep: tuple[tuple[str, float], ...] = ()
    k: float | None = None
    dsd_lambda: float | None = None
    dsd_q: float | None = None
    dsd_epochs: float | None = None

    @property
    def key(self) -> str:
        """Content address: equal candidates have equal keys, on every machine."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The candidate as canonical JSON (sorted keys)."""
        data = dataclasses.asdict(self)
        data["keep"] = dict(self.keep)
        return json.dumps(data, sort_keys=True)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> Candidate:
        """Inverse of `to_json` after parsing; keys that are not fields are ignored."""
        return cls(
            criterion=data["criterion"],
            dropped_blocks=tuple(data["dropped_blocks"]),
            select=data["select"],
            keep=tuple(sorted((str(g), float(f)) for g, f in data["keep"].items())),
            k=data["k"],
            **{name: data.get(name) for name in ("dsd_lambda", "dsd_q", "dsd_epochs")},
        )


@dataclass
class TrialResult:
    """One row of the ledger. Field order is the column order (results/README.md).

    Fractions are in 0..1, times in seconds unless the name says `_ms`, timestamps in UTC.
    A metric that was not measured is None, never NaN.
    """

    trial_id: str
    status: TrialStatus
    message: str = ""
    on_front: bool = False
    criterion: str | None = None
    candidate: str = "{}"
    dropped_blocks: list[str] = field(default_factory=list)
    widths: dict[str, int] = field(default_factory=dict)
    accuracy: float | None = None
    accuracy_before_finetune: float | None = None
    accuracy_drop: float | None = None
    accuracy_by_fidelity: list[float | None] = field(default_factory=list)
    loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # further figures of the task
    latency_ms: float | None = None
    latency_ms_p10: float | None = None
    latency_ms_p90: float | None = None
    speedup: float | None = None
    latency_ms_by_probe: dict[str, float] = field(default_factory=dict)  # of the named probes
    speedup_by_probe: dict[str, float] = field(default_factory=dict)
    macs: int | None = None
    num_params: int | None = None
    peak_memory_mib: float | None = None
    fidelity: int = 0
    epochs: float = 0.0
    score_s: float = 0.0
    prune_s: float = 0.0
    finetune_s: float = 0.0
    measure_s: float = 0.0
    wait_s: float = 0.0
    seed: int = 0
    host: str = ""
    device: str = ""
    started_at: float | None = None  # seconds since the epoch, UTC; stored as timestamp[us, UTC]
    finished_at: float | None = None
    recipe: str | None = None  # path in the run folder, while the member is kept
    weights: str | None = None

    def metric(self, name: str) -> float | None:
        """Value of a metric such as `latency_ms` or `latency_ms@edge`, as a float, or None."""
        column, _, probe = name.partition("@")
        value = getattr(self, f"{column}_by_probe").get(probe) if probe else getattr(self, name)
        return None if value is None else float(value)

    def to_json(self) -> str:
        """The row as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TrialResult:
        """Inverse of `to_json`."""
        data = json.loads(text)
        return cls(**data | {"status": TrialStatus(data["status"])})


def probes_of(results: Iterable[TrialResult]) -> list[str]:
    """The named probes that have measured any of the trials."""
    return sorted({name for result in results for name in result.latency_ms_by_probe})


def is_uniform(result: TrialResult) -> bool:
    """Whether the trial is the control that is called uniform pruning (by a real criterion)."""
    return result.criterion != "random" and str(
        json.loads(result.candidate).get("origin", "")
    ).startswith("seed: uniform")


def violations(constraints: Iterable[Constraint], result: TrialResult) -> dict[str, float]:
    """How far each constraint is exceeded; zero or less means that it holds.

    A metric that was not measured counts as exceeded without bound.
    """
    found = {}
    for constraint in constraints:
        value = result.metric(constraint.metric)
        found[str(constraint)] = math.inf if value is None else constraint.violation(value)
    return found


def with_provenance(candidate: Candidate, provenance: Mapping[str, object]) -> str:
    """The candidate's JSON for the ledger, with where it came from beside it."""
    return json.dumps(json.loads(candidate.to_json()) | dict(provenance), sort_keys=True)
