"""One probe for the architectures of all methods of a seed, after their time."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ....methods.measure import paired_latency, reference_latency_ms
from ...environment import fingerprint
from ...store import read_json, write_json
from .log import Architecture
from .problem import PeerProblem

FILE = "latencies.json"
SAVE_EVERY = 20


def measure_all(
    problem: PeerProblem, architectures: Iterable[Architecture]
) -> dict[str, dict[str, float]]:
    """Latency beside the dense model's of each architecture, by `short_key`.

    What the folder already has is not measured again.
    """
    path = problem.folder / FILE
    stored: dict[str, Any] = read_json(path) if path.exists() else {"known": {}}
    known: dict[str, dict[str, float]] = stored["known"]
    wanted = {short_key(a): a for a in architectures}
    missing = {key: a for key, a in wanted.items() if key not in known}
    if not missing:
        return known
    settings = problem.config.latency
    device = torch.device(settings.device)
    dense = contiguous(problem.dense).to(device)
    example = problem.task.example_input(settings.batch_size).to(device)
    if "reference_ms" not in stored:
        stored["reference_ms"] = reference_latency_ms(
            dense, example, threads=settings.threads, runs=settings.runs
        )
        stored["probe"] = fingerprint(device) | settings.model_dump()
    for number, (key, architecture) in enumerate(missing.items(), start=1):
        latency = paired_latency(
            architecture.build(dense).to(device),
            dense,
            example,
            reference_ms=stored["reference_ms"],
            threads=settings.threads,
            runs=settings.runs,
        )
        known[key] = {
            "speedup": latency.speedup,
            "speedup_low": latency.speedup_low,
            "speedup_high": latency.speedup_high,
            "latency_ms": latency.latency_ms,
        }
        if number % SAVE_EVERY == 0 or number == len(missing):
            write_json(path, stored)
    return known


def contiguous(model: nn.Module) -> nn.Module:
    """A copy in the plain memory layout, in which latencies are measured."""
    return copy.deepcopy(model).to(memory_format=torch.contiguous_format)


def short_key(architecture: Architecture) -> str:
    """A digest of the architecture."""
    return hashlib.sha256(architecture.key.encode()).hexdigest()[:16]
