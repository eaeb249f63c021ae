"""Removes blocks and channels from a model, exactly as a `Recipe` says.

The coupled channels of a model are found once, on the dense model (groups.py). What was found is
kept as a `PruningPlan` in the dense model's own coordinates, so that applying a recipe is one
`index_select` a tensor and needs no new trace, whatever blocks were removed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import remove_blocks
from .slicing import Side, clone, slice_channels

_MALFORMED = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError)
PRODUCERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


@dataclass(frozen=True)
class Recipe:
    """What is removed from a model: blocks by name, channels by group.

    Attributes:
        dropped_blocks: Module names replaced by `nn.Identity`, sorted.
        kept: Group name -> kept channel indices in the dense model's numbering, ascending. A group
            that is not named keeps all its channels.
    """

    dropped_blocks: tuple[str, ...] = ()
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def to_json(self) -> str:
        """The recipe as JSON; `from_json` is the inverse."""
        kept = {name: list(indices) for name, indices in sorted(self.kept.items())}
        return json.dumps({"dropped_blocks": list(self.dropped_blocks), "kept": kept})

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Parses what `to_json` wrote.

        Raises:
            ValueError: If the text is not such a recipe.
        """
        try:
            data = json.loads(text)
            return cls(
                dropped_blocks=tuple(str(name) for name in data["dropped_blocks"]),
                kept={str(g): tuple(int(i) for i in idx) for g, idx in data["kept"].items()},
            )
        except _MALFORMED as error:
            raise ValueError(
                "a recipe must be a JSON object with `dropped_blocks` and `kept`: "
                f"{type(error).__name__}: {error}."
            ) from error


@dataclass(frozen=True)
class Edit:
    """A tensor dimension that follows a group: the group's channel `root[i]` is `local[i]` here.

    Attributes:
        target: Module name, or the full name of a bare parameter.
        prune: torch-pruning's function that removes indices from the target.
        dim: Dimension of a bare parameter.
        produces: True when this is the output of a convolution or linear layer.
        local: Indices in the target's dimension, [n].
        root: The group's channel for each, [n].
    """

    target: str
    prune: Callable[[Any, Sequence[int]], Any]
    dim: int
    produces: bool
    local: Tensor
    root: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that must be removed together.

    Attributes:
        name: The first layer, in module order, whose output channels they are.
        num_channels: Number of channels.
        layers: Every convolution or linear layer whose output channels they are.
        internal: True when the group does not cross a residual add.
        parts: Channels come in this many equal parts that keep the same local indices (of grouped
            convolutions and group norms); 1 for ordinary layers.
        stage: Resolution level of the first layer's output: `stage1` is the finest.
    """

    name: str
    num_channels: int
    layers: tuple[str, ...]
    internal: bool
    parts: int
    stage: str
    edits: tuple[Edit, ...] = field(repr=False)


@dataclass(frozen=True)
class PruningPlan:
    """All removable channel groups of one dense model, and why the others are not removable."""

    groups: tuple[ChannelGroup, ...]
    excluded: Mapping[str, str]

    def __getitem__(self, name: str) -> ChannelGroup:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)

    @property
    def layers(self) -> tuple[str, ...]:
        """Every layer that a criterion has to score, once."""
        return tuple(dict.fromkeys(layer for group in self.groups for layer in group.layers))

    def alive(self, dropped_blocks: Iterable[str]) -> tuple[ChannelGroup, ...]:
        """The groups that still have a layer once `dropped_blocks` are gone."""
        dropped = tuple(dropped_blocks)
        return tuple(
            group
            for group in self.groups
            if any(not inside(layer, dropped) for layer in group.layers)
        )


def group_scores(
    group: ChannelGroup, layer_scores: Mapping[str, Tensor], dropped: Sequence[str] = ()
) -> Tensor:
    """Score of each channel of a group: the mean over the layers that make the channels.

    Layers inside `dropped` blocks do not count (unless no other is left).

    Returns:
        Scores, [num_channels], float64. With `parts` > 1 the parts' scores are summed and
        repeated, so that every part ranks its channels alike.
    """
    edits = [edit for edit in group.edits if edit.produces]
    edits = [edit for edit in edits if not inside(edit.target, dropped)] or edits
    total = torch.zeros(group.num_channels, dtype=torch.float64)
    makers = torch.zeros_like(total)
    for edit in edits:
        scores = layer_scores[edit.target].detach().double().cpu()
        total.index_add_(0, edit.root, scores[edit.local])
        makers.index_add_(0, edit.root, torch.ones(len(edit.root), dtype=torch.float64))
    total /= makers.clamp_min(1)
    if group.parts > 1:
        total = total.view(group.parts, -1).sum(0).repeat(group.parts)
    return total


def whole_columns(group: ChannelGroup, columns: Iterable[int] | Tensor) -> tuple[int, ...]:
    """The channels of a group that keeps these columns in each of its parts."""
    size = group.num_channels // group.parts
    return tuple(p * size + int(i) for p in range(group.parts) for i in columns)


def apply(model: nn.Module, plan: PruningPlan, recipe: Recipe) -> nn.Module:
    """Removes what `recipe` names from `model`, in place, and returns it.

    Args:
        model: The dense model that `plan` was made for (or a copy of it).
        plan: The model's channel groups.
        recipe: Blocks and channels to remove.

    Raises:
        ValueError: If the recipe names a group or a channel that the plan does not have, or keeps
            no channel of a group.
    """
    _check(plan, recipe)
    remove_blocks(model, recipe.dropped_blocks)
    sides: dict[str, list[Side]] = {}
    for (target, prune), (dim, removed) in _removals(plan, recipe).items():
        sides.setdefault(target, []).append(Side(prune, dim, removed))
    for target, removals in sides.items():
        slice_channels(model, target, removals)
    return model


def prune(model: nn.Module, plan: PruningPlan, recipe: Recipe) -> nn.Module:
    """A pruned copy of `model`, which stays as it is; removed blocks are not even copied.

    Args:
        model: The dense model that `plan` was made for.
        plan: The model's channel groups.
        recipe: Blocks and channels to remove.

    Raises:
        ValueError: As `apply`.
    """
    return apply(clone(model, without=recipe.dropped_blocks), plan, recipe)


def group_norms(model: nn.Module, plan: PruningPlan) -> dict[str, tuple[str, ...]]:
    """The batch norms whose channels are exactly those of an internal group, by group.

    Groups without one, and groups that cross a residual add, are left out: scaling their channels
    to zero would not remove them (DSD, section 4.1).
    """
    found = {}
    for group in plan.groups:
        every = torch.arange(group.num_channels)
        norms = {
            edit.target
            for edit in group.edits
            if edit.target
            and isinstance(_item(model, edit.target), nn.BatchNorm2d)
            and torch.equal(edit.local, every)
            and torch.equal(edit.root, every)
        }
        if group.internal and norms:
            found[group.name] = tuple(sorted(norms))
    return found


def layer_widths(model: nn.Module) -> dict[str, int]:
    """Output channels of every convolution and linear layer of `model`, in module order."""
    return {name: num_outputs(m) for name, m in model.named_modules() if isinstance(m, PRODUCERS)}


# --- application -----------------------------------------------------------------------------


def _check(plan: PruningPlan, recipe: Recipe) -> None:
    known = {group.name: group for group in plan.groups}
    for name, kept in recipe.kept.items():
        if name not in known:
            raise ValueError(
                f"`kept` (={name}) must name a channel group of the model: known are "
                f"{', '.join(known) or 'none'}. Use the recipe with the model it was made for."
            )
        group = known[name]
        if not kept or min(kept) < 0 or max(kept) >= group.num_channels:
            raise ValueError(
                f"`kept.{name}` must hold 1 to {group.num_channels} indices below "
                f"{group.num_channels}. Use the recipe with the model it was made for."
            )
        if group.parts > 1:
            size = group.num_channels // group.parts
            parts = {
                tuple(i - p * size for i in kept if i // size == p) for p in range(group.parts)
            }
            if len(parts) != 1:
                raise ValueError(
                    f"`kept.{name}` must keep the same channels in each of the layer's "
                    f"{group.parts} convolution groups. Select whole columns."
                )


def _item(model: nn.Module, target: str) -> nn.Module | nn.Parameter:
    """The module or bare parameter that an edit changes."""
    module_name, _, leaf = target.rpartition(".")
    item: nn.Module | nn.Parameter = getattr(model.get_submodule(module_name), leaf)
    return item


def _removals(
    plan: PruningPlan, recipe: Recipe
) -> dict[tuple[str, Callable[..., Any]], tuple[int, Tensor]]:
    """What each side of each layer loses: (target, side) -> (dimension, indices [n])."""
    lost: dict[tuple[str, Callable[..., Any]], tuple[int, Tensor]] = {}
    for name, kept in recipe.kept.items():
        group = plan[name]
        if len(kept) == group.num_channels:
            continue
        removed = torch.ones(group.num_channels, dtype=torch.bool)
        removed[list(kept)] = False
        for edit in group.edits:
            if inside(edit.target, recipe.dropped_blocks):
                continue
            indices = edit.local[removed[edit.root]]
            if len(indices):
                before = lost.get((edit.target, edit.prune))
                together = indices if before is None else torch.cat([before[1], indices])
                lost[edit.target, edit.prune] = edit.dim, together
    return lost


def inside(name: str, blocks: Sequence[str]) -> bool:
    """Whether the module `name` is one of `blocks` or lies in one."""
    return any(name == block or name.startswith(block + ".") for block in blocks)


def num_outputs(layer: nn.Module) -> int:
    """Output channels of a convolution or linear layer."""
    width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    assert isinstance(width, int)
    return width
