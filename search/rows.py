"""Rows of the ledger that no worker writes, and proposals read back from rows."""

from __future__ import annotations

import dataclasses
import json
import time

from .config import ConfigError
from .context import TrialSpec
from .records import Candidate, TrialResult, TrialStatus, with_provenance
from .sampler import Proposal


def trial_id(number: int) -> str:
    """The ledger's name of trial `number`."""
    return f"t{number:05d}"


def candidate_json(proposal: Proposal) -> str:
    """The candidate as the ledger keeps it, with where it came from."""
    return with_provenance(proposal.candidate, proposal.provenance())


def proposal_of(result: TrialResult) -> Proposal:
    """The proposal that a row tells the end of.

    Raises:
        ConfigError: If no search wrote the row.
    """
    try:
        data = json.loads(result.candidate)
        return Proposal(
            number=int(result.trial_id[1:]),
            candidate=Candidate.from_mapping(data),
            origin=str(data["origin"]),
            params=dict(data["params"]),
            sampler_attrs=dict(data["sampler_attrs"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"`candidate` of trial {result.trial_id} must say what was tried: "
            f"{type(error).__name__}: {error}. Take its file out of trials/ and resume: "
            "the trial is run again."
        ) from error


def duplicate_row(proposal: Proposal, first: TrialResult) -> TrialResult:
    """The row of a candidate that is the same as an earlier one: its result, no cost."""
    return dataclasses.replace(
        first,
        trial_id=trial_id(proposal.number),
        status=TrialStatus.DUPLICATE,
        message=f"same as {first.trial_id} ({first.status})",
        on_front=False,
        candidate=candidate_json(proposal),
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


def failed_row(spec: TrialSpec, known: TrialResult | None, message: str) -> TrialResult:
    """The row of a trial whose worker could not write it.

    Args:
        spec: The trial.
        known: Its row at an earlier rung, if there is one.
        message: Why it failed.
    """
    row = known or spec.new_row(TrialStatus.FAILED)
    now = time.time()
    return dataclasses.replace(row, status=TrialStatus.FAILED, message=message, finished_at=now)
