"""What all trials of one worker share, and what one trial has to do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..methods.measure import Latency
from ..methods.surgery import PruningPlan, Recipe
from ..methods.tasks import Task
from .cache import Shared, make_here
from .config import SearchConfig
from .digests import common_key, data_digest, weights_digest
from .records import FULL_FIDELITY, Candidate, TrialResult, TrialStatus

if TYPE_CHECKING:
    from .finished import FinishedTrials

MeasureLatency = Callable[[Recipe], tuple[Mapping[str, Latency], float]]


@dataclass
class TrialContext:
    """What all trials of one worker share; nothing in it is changed by a trial.

    Attributes:
        config: The run's config.
        task: Data, loss and metric, on the worker's device.
        dense: The trained dense model, on the same device.
        plan: The dense model's channel groups.
        baseline_accuracy: The dense model's validation accuracy.
        measure_latency: Latencies by probe of the architecture that a recipe makes, and the
            seconds that a probe worked on it (the rest was waiting). None where latency is not
            measured.
        shared: Scores and sparse-trained weights that the workers of a run share.
        data_digest: Content address of the data; computed when it is not given.
        finished: Trials that runs share when they have ended; None shares none.
        devices: Further devices that share the fine-tuning with the task's.
        scores: Channel scores already at hand in this worker, by criterion.
    """

    config: SearchConfig
    task: Task
    dense: nn.Module
    plan: PruningPlan
    baseline_accuracy: float
    measure_latency: MeasureLatency | None
    shared: Shared = make_here
    data_digest: str = ""
    finished: FinishedTrials | None = None
    devices: tuple[torch.device, ...] = ()
    scores: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data_digest = self.data_digest or data_digest(self.task.data)

    def key(self, kind: str) -> dict[str, Any]:
        """What every shared result of this kind depends on."""
        return common_key(
            kind,
            self.config,
            weights=self.weights_digest,
            data=self.data_digest,
            device=self.task.device,
        )

    @cached_property
    def weights_digest(self) -> str:
        """Content address of the dense weights."""
        return weights_digest(self.dense)


def only_evaluates(spec: TrialSpec, config: SearchConfig) -> bool:
    """Whether a trial takes `resources.evaluate`: it trains nothing up to its fidelity."""
    return (
        config.resources.evaluate is not None
        and spec.fidelity == 0
        and spec.candidate.dsd_lambda is None
        and config.recover.reconstruct.steps == 0
    )


@dataclass(frozen=True)
class TrialSpec:
    """What one trial has to do.

    Attributes:
        trial_id: Its name in the ledger.
        candidate: What to try.
        candidate_json: The candidate with its origin and parameters, as the ledger keeps it.
        seed: Seed of everything random in the trial.
        fidelity: How far to go: a rung of the ladder (search/early_stop.py).
        row: The trial's row at the rung where it waited; None for a new trial.
    """

    trial_id: str
    candidate: Candidate
    candidate_json: str
    seed: int
    fidelity: int = FULL_FIDELITY
    row: TrialResult | None = None

    def new_row(self, status: TrialStatus) -> TrialResult:
        """The trial's row as far as it is known before anything ran."""
        return TrialResult(
            trial_id=self.trial_id,
            status=status,
            criterion=self.candidate.criterion,
            candidate=self.candidate_json,
            dropped_blocks=list(self.candidate.dropped_blocks),
            seed=self.seed,
        )

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, as Tune's config of a trial."""
        row = None if self.row is None else self.row.to_json()
        return vars(self) | {"candidate": self.candidate.to_json(), "row": row}

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> TrialSpec:
        """Inverse of `to_mapping`; other keys may be beside."""
        candidate = Candidate.from_mapping(json.loads(data["candidate"]))
        row = None if data["row"] is None else TrialResult.from_json(data["row"])
        given = {field.name: data[field.name] for field in dataclasses.fields(cls)}
        return cls(**{**given, "candidate": candidate, "row": row})
