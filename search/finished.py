"""Finished trials that runs share: one that any run has brought to its end is not run again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .cache import Made
from .context import TrialContext, TrialSpec
from .digests import code_digest
from .records import FULL_FIDELITY, TrialResult, TrialStatus
from .shelf import Packed, address

if TYPE_CHECKING:
    from .trial import TrialOutcome

OF_THE_RUN = frozenset(
    {"trial_id", "status", "message", "on_front", "candidate", "seed", "host", "device"}
    | {"started_at", "finished_at", "recipe", "weights", "accuracy_drop"}
    | {"latency_ms", "latency_ms_p10", "latency_ms_p90", "speedup"}
    | {"latency_ms_by_probe", "speedup_by_probe"}
    | {"score_s", "prune_s", "finetune_s", "measure_s", "wait_s"}
    | {"accuracy_by_fidelity"}
)
"""Columns that each run fills in itself. Latency is among them: it is the device's, and kept
for other runs by architecture."""


@dataclass(frozen=True)
class FinishedTrials:
    """The trials that runs have finished.

    Attributes:
        find: The stored trial of this name, or None.
        add: Stores one for other runs.
        run: Name of this run, for the messages of those that reuse its trials.
    """

    find: Callable[[str], Packed | None]
    add: Callable[[str, Packed], None]
    run: str


def find_finished(spec: TrialSpec, context: TrialContext) -> Made | None:
    """The end of an equal trial of any run: its row's values, recipe and weights."""
    if context.finished is None:
        return None
    packed = context.finished.find(address(finished_key(spec, context)))
    return None if packed is None else Made.unpack(packed)


def share_finished(spec: TrialSpec, context: TrialContext, outcome: TrialOutcome) -> None:
    """Stores a trial that had its whole budget; whether it is feasible is each run's matter."""
    result = outcome.result
    ended = result.status in (TrialStatus.COMPLETED, TrialStatus.INFEASIBLE)
    if context.finished is None or not ended or result.fidelity < FULL_FIDELITY:
        return
    assert outcome.recipe is not None and outcome.state is not None
    info = {
        "row": {k: v for k, v in dataclasses.asdict(result).items() if k not in OF_THE_RUN},
        "recipe": outcome.recipe.to_json(),
        "source": f"{spec.trial_id} of {context.finished.run}",
    }
    key = finished_key(spec, context)
    state = {name: tensor.cpu() for name, tensor in outcome.state.items()}
    context.finished.add(address(key), Made(state, info).pack(key))


def fill_in(result: TrialResult, row: dict[str, Any]) -> None:
    """Copies the shared values of a finished trial into a row."""
    known = {field.name for field in dataclasses.fields(result)}
    for name in row.keys() & known:
        setattr(result, name, row[name])


def finished_key(spec: TrialSpec, context: TrialContext) -> dict[str, Any]:
    """All that a trial's row and weights depend on, except what each run fills in itself."""
    config, candidate = context.config, spec.candidate
    options = {c.name: c.options for c in config.space.criteria}
    sparse = candidate.dsd_lambda is not None
    return context.key("trial") | {
        "candidate": json.loads(candidate.to_json()),
        "options": options.get(candidate.criterion or "", {}),
        "round_to": config.space.keep.round_to,
        "groups": [group.name for group in context.plan.groups],
        "recover": config.recover.model_dump(mode="json"),
        "sparse_training": config.sparse_training.model_dump(mode="json") if sparse else None,
        "memory_of_images": config.latency.batch_size,
        "trial_seed": spec.seed,
        "search_code": code_digest(search=True),
    }
