"""Finds the channels of a model that must be removed together, and proves that they can be.

channel_flow.py says which channels meet where; here they become groups. Every group is then
proven: the pruned model must equal the dense one with the removed channels masked. This is the
only module that imports torch-pruning, for its functions that cut channels out of a layer; its
dependency graph fails on shuffles, splits, shared heads and windows (METHODS, section 8).
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .channel_flow import follow_channels
from .flow import Flow, Port
from .labels import NONE
from .models.resnet_cifar import ZeroPadShortcut
from .proof import enliven, provable
from .surgery import PRODUCERS, ChannelGroup, Edit, PruningPlan
from .trace import kept_whole


def _import_torch_pruning() -> Any:
    """torch-pruning without timm: it imports that, for seconds, to count what nobody asks for."""
    if "timm" in sys.modules:
        return import_module("torch_pruning")
    sys.modules["timm"] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        return import_module("torch_pruning")
    finally:
        del sys.modules["timm"]


tp = _import_torch_pruning()

Classes = NDArray[np.int64]


def plan_pruning(model: nn.Module, example_input: Tensor, *, scope: str = "all") -> PruningPlan:
    """Finds the channel groups of `model`.

    The model is traced on a copy and stays untouched. A group that breaks the model, or whose
    removal is not the same as masking its channels, is excluded with the reason.

    Args:
        model: The dense model.
        example_input: A batch that the model accepts, [B, C, H, W].
        scope: `all`, or `internal` for groups that do not cross a residual add.

    Raises:
        ValueError: If the model does not run on the example.
    """
    traced = copy.deepcopy(model).eval()
    try:
        flow = follow_channels(traced, example_input[:1])
    except Exception as error:  # whatever a foreign model raises
        raise ValueError(
            "the model must run on one image to find its channels: it stopped with "
            f"{type(error).__name__}: {error}. Search over blocks only (space.criteria: [])."
        ) from error
    groups, excluded = _Coupling(traced, flow).groups()
    enliven(traced)
    if scope == "internal":
        for group in groups:
            if not group.internal:
                excluded[group.name] = "crosses a residual add (space.keep.scope = all admits it)"
        groups = [group for group in groups if group.internal]
    groups, broken = provable(traced, groups, example_input[:2])
    return PruningPlan(tuple(groups), {**excluded, **broken})


# --- from what was seen to groups ------------------------------------------------------------


class _Coupling:
    """The channels of one flow as classes: labels that must be removed together.

    Args:
        model: The model that was followed.
        flow: What was seen.
    """

    def __init__(self, model: nn.Module, flow: Flow) -> None:
        from scipy.sparse import coo_array  # half a second that workers and probes need not wait
        from scipy.sparse.csgraph import connected_components

        self._modules = dict(model.named_modules())
        self._flow = flow
        self._whole = kept_whole(model)
        pairs = torch.cat([*flow.pairs, torch.zeros(2, 0, dtype=torch.long)], 1).numpy()
        size = max(1, flow.num_labels)
        matrix = coo_array((np.ones(pairs.shape[1]), (pairs[0], pairs[1])), shape=(size, size))
        self._num_classes, self._classes = connected_components(matrix, directed=False)
        self._lost = [(self._of(labels), reason) for labels, reason in flow.lost]
        self._divisions = [(self._of(d.labels), d.parts, d.reason) for d in flow.divisions]
        self._added = np.zeros(self._num_classes, dtype=bool)
        for labels in flow.added:
            self._added[self._of(labels)] = True
        self._ports = {port: self._of(labels) for port, labels in flow.ports.items()}
        self._ports |= dict(self._bare_ports())
        self._reasons: dict[int, str] = {}
        for classes, reason in self._lost:
            for index in np.unique(classes):
                self._reasons.setdefault(int(index), reason)
        self._where = np.repeat(
            np.arange(len(self._ports)), np.array([*map(len, self._ports.values())], dtype=int)
        )
        none = np.zeros(0, np.int64)
        self._local = np.concatenate([none, *(np.arange(len(c)) for c in self._ports.values())])
        self._met = np.concatenate([none, *self._ports.values()])

    def groups(self) -> tuple[list[ChannelGroup], dict[str, str]]:
        """Every group in module order, and why the other layers have none."""
        levels = sorted(set(self._flow.pixels.values()), reverse=True)
        groups: list[ChannelGroup] = []
        excluded: dict[str, str] = {}
        seen: set[str] = set()
        for name, module in self._modules.items():
            if not isinstance(module, PRODUCERS) or name in seen:
                continue
            if name not in self._flow.made:
                excluded[name] = self._unseen(name)
                continue
            group, trouble = self._group(name)
            seen.update(group.layers)
            if trouble:
                excluded[name] = trouble
            else:
                stage = f"stage{levels.index(self._flow.pixels[name]) + 1}"
                groups.append(replace(group, stage=stage))
        return groups, excluded

    def _unseen(self, name: str) -> str:
        """Why a layer was not called in the forward pass."""
        whole = next((part for part in self._whole if _inside(name, part)), None)
        if whole is not None:
            return f"lies in {whole}, which the model keeps whole"
        if isinstance(self._modules[name.rpartition(".")[0]], nn.MultiheadAttention):
            return "is part of an attention layer, whose width stays"
        return "does not reach the model's output in a forward pass"

    def _of(self, labels: Tensor) -> Classes:
        """The class of each label; NONE stays."""
        numbers = labels.numpy()
        return np.where(numbers == NONE, NONE, self._classes[numbers]).astype(np.int64)

    def _bare_ports(self) -> list[tuple[Port, Classes]]:
        """The dimension of each bare tensor along which it follows channels of layers."""
        of_layers = np.zeros(self._num_classes, dtype=bool)
        for classes in self._ports.values():
            of_layers[classes[classes != NONE]] = True
        ports = []
        for name, labels in self._flow.bare.items():
            classes = self._classes[labels.numpy()]
            if not of_layers[classes].any():
                continue
            dims = [d for d in range(classes.ndim) if classes.shape[d] > 1]
            rows = {d: np.moveaxis(classes, d, 0).reshape(classes.shape[d], -1) for d in dims}
            dim = next((d for d in dims if (rows[d] == rows[d][:, :1]).all()), None)
            if dim is None:
                self._lost.append((classes.ravel(), f"is tied to {name} at every position alike"))
            else:
                ports.append((Port(name, "tensor", dim), rows[dim][:, 0]))
        return ports

    def _group(self, name: str) -> tuple[ChannelGroup, str]:
        """The group of one layer's output channels, and why it cannot be pruned (or nothing)."""
        own = self._of(self._flow.made[name])
        roots = np.full(self._num_classes + 1, NONE)  # the last one for NONE itself
        roots[own] = np.arange(len(own))
        edits = self._edits(roots)
        layers = tuple(dict.fromkeys(edit.target for edit in edits if edit.produces))
        parts, trouble = self._parts(roots, len(own))
        trouble = next((self._reasons[c] for c in own if c in self._reasons), trouble)
        whole = next((part for part in self._whole if any(_inside(n, part) for n in layers)), None)
        if whole is not None:
            trouble = f"lies in {whole}, which the model keeps whole"
        if len(np.unique(own)) < len(own):
            trouble = trouble or "couples its own channels with each other"
        if not trouble and len(own) % parts:
            trouble = f"its {len(own)} channels do not divide into the {parts} parts they must"
        if not trouble and len(own) == parts:
            trouble = "has no channel to spare: one in each part that must stay"
        internal = not self._added[own].any()
        return ChannelGroup(name, len(own), layers, bool(internal), parts, "", edits), trouble

    def _edits(self, roots: Classes) -> tuple[Edit, ...]:
        met = roots[self._met]
        hits = np.flatnonzero(met != NONE)
        ports = list(self._ports)
        edits = []
        for index in np.unique(self._where[hits]):
            here = hits[self._where[hits] == index]
            port = ports[index]
            module = self._modules.get(port.target)
            edits.append(
                Edit(
                    target=port.target,
                    prune=_pruning_function(module, port.side),
                    dim=port.dim,
                    produces=port.side == "out" and isinstance(module, PRODUCERS),
                    local=torch.as_tensor(self._local[here], dtype=torch.long),
                    root=torch.as_tensor(met[here], dtype=torch.long),
                )
            )
        places = {target: place for place, target in enumerate([*self._modules, *self._flow.bare])}
        return tuple(sorted(edits, key=lambda edit: places[edit.target]))

    def _parts(self, roots: Classes, size: int) -> tuple[int, str]:
        """Into how many equal parts the channels must divide, and what forbids any part."""
        parts, trouble = 1, ""
        for classes, pieces, reason in self._divisions:
            here = roots[classes]
            if (here == NONE).all():
                continue
            if len(here) == size and (here == np.arange(size)).all():
                parts = math.lcm(parts, pieces)
            else:
                trouble = reason
        return parts, trouble


def _pruning_function(module: nn.Module | None, side: str) -> Callable[[Any, Sequence[int]], Any]:
    """torch-pruning's function that removes channels on one side of a layer."""
    pruner: Any
    if isinstance(module, ZeroPadShortcut):
        pruner = _ZERO_PAD
    elif module is None or side == "tensor":
        pruner = tp.pruner.function.PrunerBox[tp.ops.OPTYPE.PARAMETER]
    else:
        pruner = tp.pruner.function.PrunerBox[tp.ops.module2type(module)]
    function: Callable[[Any, Sequence[int]], Any] = (
        pruner.prune_in_channels if side == "in" else pruner.prune_out_channels
    )
    return function


class _ZeroPadPruner(tp.BasePruningFunc):  # type: ignore[misc, name-defined]
    """Edits the wiring of an option-A shortcut; its two sides are independent of each other."""

    TARGET_MODULES = ZeroPadShortcut

    def prune_out_channels(self, layer: ZeroPadShortcut, idxs: Sequence[int]) -> nn.Module:
        layer.dst, layer.src = _rewire(layer.dst, layer.src, idxs, layer.out_channels)
        layer.out_channels -= len(idxs)
        return layer

    def prune_in_channels(self, layer: ZeroPadShortcut, idxs: Sequence[int]) -> nn.Module:
        layer.src, layer.dst = _rewire(layer.src, layer.dst, idxs, layer.in_channels)
        layer.in_channels -= len(idxs)
        return layer

    def get_out_channels(self, layer: ZeroPadShortcut) -> int:
        return layer.out_channels

    def get_in_channels(self, layer: ZeroPadShortcut) -> int:
        return layer.in_channels


_ZERO_PAD = _ZeroPadPruner()


def _rewire(
    ends: Tensor, others: Tensor, removed: Sequence[int], size: int
) -> tuple[Tensor, Tensor]:
    """Drops the wires whose end is removed and renumbers the ends that stay."""
    stays = torch.ones(size, dtype=torch.bool, device=ends.device)
    stays[list(removed)] = False
    wires = stays[ends]
    return (stays.cumsum(0) - 1)[ends[wires]], others[wires]


def _inside(target: str, part: str) -> bool:
    return target == part or target.startswith(f"{part}.")
