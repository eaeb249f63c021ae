"""What a method writes: one JSON line for each finished candidate, and its weights."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from ....methods.measure import count_macs, count_params
from ....methods.shapes import Attributes, changed_attributes, copy_state, rebuild
from ...store import atomic_write_bytes
from .problem import PeerProblem

LINES = "candidates.jsonl"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A pruned model without its weights: removed blocks, changed attributes, tensor shapes."""

    dropped_blocks: list[str]
    attributes: Attributes
    shapes: dict[str, list[int]]

    @classmethod
    def of(cls, dense: nn.Module, pruned: nn.Module) -> Architecture:
        """Reads it from a pruned copy of `dense`."""
        before = dict(dense.named_modules())
        dropped = [
            name
            for name, module in pruned.named_modules()
            if isinstance(module, nn.Identity) and not isinstance(before[name], nn.Identity)
        ]
        whole = dense.state_dict()
        shapes = {
            name: list(tensor.shape)
            for name, tensor in pruned.state_dict().items()
            if tensor.shape != whole[name].shape
        }
        return cls(dropped, changed_attributes(dense, pruned), shapes)

    @property
    def key(self) -> str:
        """Equal for equal architectures."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def build(self, dense: nn.Module) -> nn.Module:
        """A model of this architecture, with corners of the dense weights in it."""
        inside = tuple(f"{name}." for name in self.dropped_blocks)
        state: Mapping[str, Tensor] = {
            name: tensor[tuple(slice(n) for n in self.shapes.get(name, tensor.shape))].clone()
            for name, tensor in dense.state_dict().items()
            if not inside or not name.startswith(inside)
        }
        return rebuild(copy.deepcopy(dense), self.dropped_blocks, self.attributes, state)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A finished candidate.

    Attributes:
        label: What the method calls it.
        seconds: Since the method's process was started.
        accuracy: Validation accuracy after the whole recovery.
        macs: Multiply-adds of one image.
        num_params: Parameters.
        architecture: What it is.
        weights: File of its weights in the method's folder; None where they are not kept.
    """

    label: str
    seconds: float
    accuracy: float
    macs: int
    num_params: int
    architecture: Architecture
    weights: str | None = None

    def to_json(self) -> str:
        """One line of the log."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Entry:
        """Inverse of `to_json`."""
        data = json.loads(line)
        return cls(**data | {"architecture": Architecture(**data["architecture"])})


class Log:
    """Appends to a method's log; several processes may do so at a time."""

    def __init__(self, folder: Path, problem: PeerProblem, started: float) -> None:
        self.folder = folder
        self._problem = problem
        self._started = started

    def seconds(self) -> float:
        """Since the method's process was started."""
        return time.time() - self._started

    def finished(self, label: str, model: nn.Module, accuracy: float) -> None:
        """Records a recovered candidate and its weights."""
        seconds = self.seconds()
        weights = f"weights/{label}.safetensors"
        atomic_write_bytes(self.folder / weights, save(copy_state(model)))
        dense = self._problem.dense
        self.add(
            Entry(
                label,
                seconds,
                accuracy,
                count_macs(model, self._problem.task.example_input()),
                count_params(model),
                Architecture.of(dense, model),
                weights,
            )
        )

    def failed(self, label: str, error: Exception) -> None:
        """Records a candidate that came to nothing."""
        message = f"{type(error).__name__}: {error}"
        self._append({"label": label, "seconds": self.seconds(), "failed": message})

    def add(self, entry: Entry) -> None:
        """Records a candidate as it is given."""
        self._append(dataclasses.asdict(entry))

    def _append(self, data: Mapping[str, Any]) -> None:
        """One write to a file opened for appending, so that no process tears another's line."""
        line = (json.dumps(data) + "\n").encode()
        handle = os.open(self.folder / LINES, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line)
        finally:
            os.close(handle)


def read_log(folder: Path, seconds: float) -> list[Entry]:
    """The candidates that were finished in time, in the order of their ends.

    A last line that was cut off when the method was stopped is left out.
    """
    path = folder / LINES
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    rows = [json.loads(line) for line in lines]
    entries = [Entry.from_json(json.dumps(row)) for row in rows if "failed" not in row]
    return sorted((e for e in entries if e.seconds <= seconds), key=lambda e: e.seconds)


def count_failures(folder: Path) -> int:
    """Candidates that came to nothing."""
    path = folder / LINES
    return path.read_text(encoding="utf-8").count('"failed": ') if path.exists() else 0
