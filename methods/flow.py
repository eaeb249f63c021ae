"""What a followed forward pass tells about channels, and the labels of its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .labels import NONE, overlay


@dataclass(frozen=True)
class Port:
    """A place where channels enter or leave: one side of a layer, or a bare tensor.

    Attributes:
        target: Module name, or the full name of a parameter or buffer.
        side: `out`, `in`, `both` (norms), or `tensor`.
        dim: The dimension of a bare tensor; -1 else.
    """

    target: str
    side: str
    dim: int = -1


@dataclass(frozen=True)
class Division:
    """Channels that a layer or an operation divides into equal parts by their position.

    Attributes:
        labels: [n].
        parts: How many.
        reason: Why other channels must not be among them.
    """

    labels: Tensor
    parts: int
    reason: str


@dataclass
class Flow:
    """What one pass told.

    Attributes:
        num_labels: Labels are below this.
        made: Layer -> labels of its output channels, [n].
        ports: Place -> labels of its channels, [n]; `NONE` where it takes a constant.
        bare: Parameters and buffers outside of layers -> labels of all their elements.
        pairs: Labels that belong to one channel, [2, n] each.
        lost: Labels that cannot be removed, with the reason.
        added: Labels that met in an addition.
        divisions: What must stay divisible.
        pixels: Layer -> pixels of its output.
    """

    num_labels: int = 0
    made: dict[str, Tensor] = field(default_factory=dict)
    ports: dict[Port, Tensor] = field(default_factory=dict)
    bare: dict[str, Tensor] = field(default_factory=dict)
    pairs: list[Tensor] = field(default_factory=list)
    lost: list[tuple[Tensor, str]] = field(default_factory=list)
    added: list[Tensor] = field(default_factory=list)
    divisions: list[Division] = field(default_factory=list)
    pixels: dict[str, int] = field(default_factory=dict)

    def fresh(self, count: int) -> Tensor:
        """So many new labels."""
        start, self.num_labels = self.num_labels, self.num_labels + count
        return torch.arange(start, start + count)

    def enter(self, port: Port, labels: Tensor) -> None:
        """The channels at a place; those of a later call belong to the ones of the first."""
        known = self.ports.get(port)
        if known is None:
            self.ports[port] = labels
        else:
            merged, pairs = overlay(known, labels, known.shape)
            self.ports[port] = merged
            self.pairs.append(pairs)


class Labelled(TorchFunctionMode):
    """Knows the labels of the tensors of a pass, and in which module the pass is.

    Attributes:
        flow: What is told.
        labels: Tensor -> labels of its elements, of the same shape.
        inside: The modules that the pass is in, with their names, the innermost last.
        num_bare: Labels below this belong to parameters and buffers outside of layers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flow = Flow()
        self.labels: Any = WeakTensorKeyDictionary()
        self.inside: list[tuple[str, nn.Module]] = [("", model)]
        self.num_bare = 0

    @property
    def where(self) -> str:
        """The module that the pass is in, for people."""
        return self.inside[-1][0] or "the model's own forward"

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor has labels."""
        return tensor in self.labels

    def is_bare(self, tensor: Tensor) -> bool:
        """Whether a tensor is, or comes from, a parameter or buffer outside of layers."""
        labels = self.labels[tensor]
        return bool(labels.numel() == 0 or labels.amax() < self.num_bare)

    def lose(self, given: Sequence[Tensor], reason: str) -> None:
        """These tensors' channels cannot be removed."""
        for tensor in given:
            if self.has(tensor):
                labels = torch.unique(self.labels[tensor])
                self.flow.lost.append((labels[labels != NONE], reason))

    def couple(self, one: Tensor, other: Tensor) -> None:
        """Two vectors of labels belong to the same channels, [n] each."""
        self.flow.pairs.append(overlay(one, other, one.shape)[1])
