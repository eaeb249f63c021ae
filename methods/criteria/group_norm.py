"""Norm of all that goes with a channel (DepGraph). Fang et al. 2023, arXiv:2301.12900."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..layers import Layer, channel_rows, get_layer
from ..surgery import ChannelGroup, Edit
from .scoring import DataFreeTask, scoring


def group_norm(
    model: nn.Module,
    task: DataFreeTask,
    layers: Sequence[str],
    *,
    generator: torch.Generator,
    normalize: Literal["mean", "none"] = "mean",
) -> dict[str, Tensor]:
    """Squared norm of all parameters that go with a channel (DepGraph).

    score_c = sum of w^2 over the filters that make channel c, the scales of its norms and the
    weights that read it, in all layers whose channels must be removed together; then divided by
    the mean over the group, so that groups compare. Biases and shifts do not count.

    Args:
        model: The dense model; traced on a copy.
        task: Gives the shape of an image.
        layers: Names of the layers to score.
        generator: Not used.
        normalize: `none` leaves out the division.

    Returns:
        Layer name to scores, [out]: all layers of a group have the group's. A layer whose
        channels cannot be removed is scored by its own weights.
    """
    from ..groups import plan_pruning  # here, because torch-pruning is slow to import

    with scoring(model):
        groups = plan_pruning(model, task.example_input(2)).groups
    scale = _over_mean if normalize == "mean" else torch.Tensor.float
    scores = {}
    for name in layers:
        layer = get_layer(model, name)
        own = channel_rows(layer, layer.weight.detach()).double().square().sum(1)
        scores[name] = scale(own.cpu())
    for group in groups:
        if not scores.keys().isdisjoint(group.layers):
            values = scale(_sums_of_squares(model, group))
            for edit in group.edits:
                if edit.produces and edit.target in scores:
                    scores[edit.target][edit.local] = values[edit.root]
    return scores


def _over_mean(values: Tensor) -> Tensor:
    mean = values.mean()
    return (values if mean == 0 else values / mean).float()


def _sums_of_squares(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Over everything that goes with each channel of the group, [num_channels], float64."""
    total = torch.zeros(group.num_channels, dtype=torch.float64)
    for edit in group.edits:
        rows = _rows(model, edit)
        if rows is not None:
            total.index_add_(0, edit.root, rows.double().square().sum(1).cpu()[edit.local])
    return total


def _rows(model: nn.Module, edit: Edit) -> Tensor | None:
    """The parameters of each channel of an edit's dimension, [channels, rest], if it has any."""
    place, _, leaf = edit.target.rpartition(".")
    target = getattr(model.get_submodule(place), leaf)
    if isinstance(target, nn.Parameter):
        return target.detach().movedim(edit.dim, 0).flatten(1)
    weight = getattr(target, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if not isinstance(target, Layer):
        return weight.detach().flatten()[:, None]
    rows = channel_rows if edit.produces else _input_rows
    return rows(target, weight.detach())


def _input_rows(layer: Layer, weight: Tensor) -> Tensor:
    """The weights that read each input channel, [in, rest]."""
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.flatten(1)
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    grouped = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return grouped.transpose(1, 2).reshape(groups * weight.shape[1], -1)
