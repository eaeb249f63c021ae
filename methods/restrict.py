"""Prunes a pruned model again: the plan in its own coordinates, and two recipes as one.

A plan speaks of the dense model's channels. After `apply` every dimension is shorter and its
indices have moved up; `restrict` moves the plan's indices along, so no new trace is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .surgery import ChannelGroup, Edit, PruningPlan, Recipe, inside, layer_widths

Removed = dict[
    tuple[object, ...], Tensor
]  # target's dimension -> indices that are gone, ascending


def restrict(model: nn.Module, plan: PruningPlan, recipe: Recipe) -> PruningPlan:
    """The plan of a pruned model, in its own coordinates.

    Groups keep their names, also where the layer that gave the name went with a dropped block, so
    that `compose` can lead back to the dense model. A group with no layer left is excluded.

    Args:
        model: The pruned model: what `apply(dense, plan, recipe)` returned.
        plan: The plan that `recipe` was applied with.
        recipe: What was removed.

    Returns:
        A plan for `apply(model, ...)`.

    Raises:
        ValueError: If the model is not the one that `recipe` makes.
    """
    alive = {group.name for group in plan.alive(recipe.dropped_blocks)}
    removed = _removed(plan, recipe)
    groups = [_restricted(g, recipe, removed) for g in plan.groups if g.name in alive]
    _check(model, groups)
    gone = {g.name: "lies in a dropped block" for g in plan.groups if g.name not in alive}
    return PruningPlan(tuple(groups), {**plan.excluded, **gone})


def compose(plan: PruningPlan, first: Recipe, second: Recipe) -> Recipe:
    """The recipe that does at once what `first`, and then `second`, do.

    Args:
        plan: The dense model's plan, which `first` was made with.
        first: Applied to the dense model.
        second: Applied to the result, with `restrict`'s plan; in that plan's coordinates.

    Returns:
        A recipe in the dense model's coordinates.

    Raises:
        ValueError: If `second` names a group or a channel that is no longer there.
    """
    kept = dict(first.kept)
    for name, indices in second.kept.items():
        try:
            there = kept.get(name) or tuple(range(plan[name].num_channels))
            kept[name] = tuple(there[index] for index in indices)
        except (KeyError, IndexError) as error:
            raise ValueError(
                f"`second.kept` (={name}: {indices}) must hold channels that the first recipe "
                f"left: {error} is not one. Make it with the plan that `restrict` returns."
            ) from error
    return Recipe(tuple(sorted({*first.dropped_blocks, *second.dropped_blocks})), kept)


def _removed(plan: PruningPlan, recipe: Recipe) -> Removed:
    """What all groups together took from each dimension."""
    parts: dict[tuple[object, ...], list[Tensor]] = {}
    for group in plan.groups:
        gone = ~_stays(group, recipe.kept)
        for edit in group.edits:
            if not inside(edit.target, recipe.dropped_blocks):
                parts.setdefault(_dimension(edit), []).append(edit.local[gone[edit.root]])
    return {key: torch.unique(torch.cat(indices)) for key, indices in parts.items()}


def _restricted(group: ChannelGroup, recipe: Recipe, removed: Removed) -> ChannelGroup:
    stays = _stays(group, recipe.kept)
    edits = tuple(
        _renumbered(edit, stays, removed[_dimension(edit)])
        for edit in group.edits
        if not inside(edit.target, recipe.dropped_blocks)
    )
    layers = tuple(layer for layer in group.layers if not inside(layer, recipe.dropped_blocks))
    return replace(group, num_channels=int(stays.sum()), layers=layers, edits=edits)


def _renumbered(edit: Edit, stays: Tensor, removed: Tensor) -> Edit:
    """The edit without what is gone; an index falls by the number of removed ones below it."""
    here = stays[edit.root] & ~torch.isin(edit.local, removed)
    local, root = edit.local[here], edit.root[here]
    return replace(
        edit,
        local=local - torch.searchsorted(removed, local),
        root=(stays.cumsum(0) - 1)[root],
    )


def _stays(group: ChannelGroup, kept: Mapping[str, Sequence[int]]) -> Tensor:
    """Whether each channel of the group is kept, [num_channels]."""
    stays = torch.full((group.num_channels,), group.name not in kept)
    stays[list(kept.get(group.name, ()))] = True
    return stays


def _dimension(edit: Edit) -> tuple[object, ...]:
    return edit.target, edit.prune, edit.dim


def _check(model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
    widths = layer_widths(model)
    for group in groups:
        width = widths.get(group.name, group.num_channels)  # its layer may be in a dropped block
        if width != group.num_channels:
            raise ValueError(
                f"`model` (where {group.name} has {width} channels) must be what the recipe "
                f"makes: {group.num_channels} should be left. Give what `apply` returned."
            )
