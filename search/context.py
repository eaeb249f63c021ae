"""What all trials of one worker share, and what one trial has to do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor, nn

from ..methods.measure import Latency
from ..methods.surgery import PruningPlan, Recipe
from ..methods.tasks.classification import ClassificationTask
from .cache import Made, make_here
from .config import SearchConfig
from .records import Candidate


class Shared(Protocol):
    """Results that trials share: made by the first that asks, read by the others."""

    def __call__(self, key: Mapping[str, Any], make: Callable[[], Made]) -> tuple[Made, float]:
        """The result called `key`, and the seconds spent waiting for another trial to make it."""


@dataclass
class TrialContext:
    """What all trials of one worker share; nothing in it is changed by a trial.

    Attributes:
        config: The run's config.
        task: Data, loss and metric, on the worker's device.
        dense: The trained dense model, on the same device.
        plan: The dense model's channel groups.
        baseline_accuracy: The dense model's validation accuracy.
        measure_latency: Latency of the architecture that a recipe makes, and the seconds that
            the probe worked on it (the rest was waiting). None where latency is not measured.
        shared: Scores and sparse-trained weights that the workers of a run share.
        scores: Channel scores already at hand in this worker, by criterion.
    """

    config: SearchConfig
    task: ClassificationTask
    dense: nn.Module
    plan: PruningPlan
    baseline_accuracy: float
    measure_latency: Callable[[Recipe], tuple[Latency, float]] | None
    shared: Shared = make_here
    scores: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @cached_property
    def weights_digest(self) -> str:
        """Content address of the dense weights."""
        digest = hashlib.sha256()
        for name, tensor in self.dense.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class TrialSpec:
    """What one trial has to do.

    Attributes:
        trial_id: Its name in the ledger.
        candidate: What to try.
        candidate_json: The candidate with its origin and parameters, as the ledger keeps it.
        seed: Seed of everything random in the trial.
    """

    trial_id: str
    candidate: Candidate
    candidate_json: str
    seed: int
