"""Removes blocks and channels from a model, exactly as a `Recipe` says.

The coupled channels of a model are found once, on the dense model, by torch-pruning's dependency
graph; this is the only module that imports it. What the graph says is kept as a `PruningPlan` in
the dense model's own coordinates, so that applying a recipe is one `index_select` a tensor and
needs no new trace, whatever blocks were removed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from .blocks import remove_blocks
from .finetune import BATCH_NORMS
from .models.resnet_cifar import ZeroPadShortcut

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
        data = json.loads(text)
        if not isinstance(data, dict) or not {"dropped_blocks", "kept"} <= data.keys():
            raise ValueError("a recipe must be a JSON object with `dropped_blocks` and `kept`.")
        return cls(
            dropped_blocks=tuple(str(name) for name in data["dropped_blocks"]),
            kept={str(g): tuple(int(i) for i in idx) for g, idx in data["kept"].items()},
        )


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
        internal: True when the group does not cross a residual add: one layer makes the channels.
        parts: Channels come in this many equal parts that keep the same local indices
            (convolution groups and attention heads); 1 for ordinary layers.
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
            if any(not _inside(layer, dropped) for layer in group.layers)
        )


def plan_pruning(model: nn.Module, example_input: Tensor, *, scope: str = "all") -> PruningPlan:
    """Finds the channel groups of `model`.

    The model is traced on a copy and stays untouched. Every group is proven by pruning it and
    running the result: one that breaks the model is excluded, with the reason.

    Args:
        model: The dense model.
        example_input: A batch that the model accepts, [B, C, H, W].
        scope: `all`, or `internal` for groups that do not cross a residual add.

    Raises:
        ValueError: If the model cannot be traced by autograd.
    """
    groups, excluded = _trace_groups(model, example_input)
    if scope == "internal":
        for group in groups:
            if not group.internal:
                excluded[group.name] = "crosses a residual add (space.keep.scope = all admits it)"
        groups = [group for group in groups if group.internal]
    groups, broken = _provable(model, groups, example_input)
    return PruningPlan(tuple(groups), {**excluded, **broken})


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
    edits = [edit for edit in edits if not _inside(edit.target, dropped)] or edits
    total = torch.zeros(group.num_channels, dtype=torch.float64)
    for edit in edits:
        scores = layer_scores[edit.target].detach().double().cpu()
        total.index_add_(0, edit.root, scores[edit.local])
    total /= len(edits)
    if group.parts > 1:
        total = total.view(group.parts, -1).sum(0).repeat(group.parts)
    return total


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
    removals: dict[tuple[str, Callable[..., Any]], set[int]] = {}
    dims: dict[tuple[str, Callable[..., Any]], int] = {}
    for name, kept in recipe.kept.items():
        group = plan[name]
        removed = torch.ones(group.num_channels, dtype=torch.bool)
        removed[list(kept)] = False
        for edit in group.edits:
            if _inside(edit.target, recipe.dropped_blocks):
                continue
            indices = edit.local[removed[edit.root]].tolist()
            if indices:
                removals.setdefault((edit.target, edit.prune), set()).update(indices)
                dims[edit.target, edit.prune] = edit.dim
    for (target, prune), indices_set in removals.items():
        _remove(model, target, prune, sorted(indices_set), dims[target, prune])
    return model


def layer_widths(model: nn.Module) -> dict[str, int]:
    """Output channels of every convolution and linear layer of `model`, in module order."""
    return {name: _num_outputs(m) for name, m in model.named_modules() if isinstance(m, PRODUCERS)}


def full_recipe(plan: PruningPlan) -> Recipe:
    """The recipe that removes nothing."""
    return Recipe((), {group.name: tuple(range(group.num_channels)) for group in plan.groups})


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


def _remove(
    model: nn.Module, target: str, prune: Callable[..., Any], indices: list[int], dim: int
) -> None:
    module_name, _, leaf = target.rpartition(".")
    parent = model.get_submodule(module_name)
    item = getattr(parent, leaf)
    prune.__self__.pruning_dim = dim  # type: ignore[attr-defined]  # torch-pruning's own protocol
    result = prune(item, indices)
    if isinstance(item, nn.Parameter):
        setattr(parent, leaf, result)


def _inside(name: str, blocks: Sequence[str]) -> bool:
    return any(name == block or name.startswith(block + ".") for block in blocks)


def _num_outputs(layer: nn.Module) -> int:
    width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    assert isinstance(width, int)
    return width


# --- finding the groups ----------------------------------------------------------------------


class _ZeroPadPruner(tp.BasePruningFunc):  # type: ignore[misc]
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


def _rewire(
    ends: Tensor, others: Tensor, removed: Sequence[int], size: int
) -> tuple[Tensor, Tensor]:
    """Drops the wires whose end is removed and renumbers the ends that stay."""
    stays = torch.ones(size, dtype=torch.bool, device=ends.device)
    stays[list(removed)] = False
    wires = stays[ends]
    return (stays.cumsum(0) - 1)[ends[wires]], others[wires]


def _trace_groups(
    model: nn.Module, example_input: Tensor
) -> tuple[list[ChannelGroup], dict[str, str]]:
    traced = copy.deepcopy(model).eval().requires_grad_(True)
    example_input = example_input[:1]
    spatial, outputs = _trace_shapes(traced, example_input)
    graph = tp.DependencyGraph()
    try:
        with torch.enable_grad():
            graph.build_dependency(
                traced,
                example_inputs=example_input,
                unwrapped_parameters=[],
                customized_pruners={ZeroPadShortcut: _ZeroPadPruner()},
                ignored_layers=[],
                verbose=False,
            )
    except (RuntimeError, IndexError, KeyError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(
            "the model must be traceable by autograd to prune channels: torch-pruning stopped "
            f"with {type(error).__name__}: {error}. Search over blocks only (space.criteria: [])."
        ) from error
    names = {module: name for name, module in traced.named_modules()}
    names.update({parameter: name for name, parameter in traced.named_parameters()})
    levels = sorted({size for size in spatial.values()}, reverse=True)
    groups: list[ChannelGroup] = []
    excluded: dict[str, str] = {}
    seen: set[str] = set()
    for name, module in traced.named_modules():
        if not isinstance(module, PRODUCERS) or name in seen or module not in graph.module2node:
            continue
        group = _read_group(graph, names, name, module)
        seen.update(group.layers)
        if outputs & set(group.layers):
            excluded[name] = "makes the model's output"
        elif name not in spatial:
            excluded[name] = "is not called in a forward pass"
        else:
            stage = f"stage{levels.index(spatial[name]) + 1}"
            groups.append(
                ChannelGroup(
                    name,
                    group.num_channels,
                    group.layers,
                    group.internal,
                    group.parts,
                    stage,
                    group.edits,
                )
            )
    return groups, excluded


def _read_group(
    graph: Any, names: Mapping[Any, str], name: str, module: nn.Module
) -> ChannelGroup:
    num_channels = _num_outputs(module)
    prune_out = graph.get_pruner_of_module(module).prune_out_channels
    edits = []
    parts = 1
    for item in graph.get_pruning_group(module, prune_out, list(range(num_channels))):
        target = item.dep.target.module
        if target not in names or not _holds_channels(target):
            continue  # an activation, a reshape, a split: nothing to edit
        is_output = graph.is_out_channel_pruning_fn(item.dep.handler)
        edits.append(
            Edit(
                target=names[target],
                prune=item.dep.handler,
                dim=item.dep.target.pruning_dim,
                produces=isinstance(target, PRODUCERS) and is_output,
                local=torch.as_tensor(item.idxs, dtype=torch.long),
                root=torch.as_tensor(item.root_idxs, dtype=torch.long),
            )
        )
        conv_groups = getattr(target, "groups", 1)
        if isinstance(target, nn.Conv2d) and 1 < conv_groups < target.out_channels:
            parts = max(parts, conv_groups)
    layers = tuple(dict.fromkeys(edit.target for edit in edits if edit.produces))
    makers = [layer for layer in layers if not _is_depthwise(graph.model.get_submodule(layer))]
    internal = len(makers) <= 1
    return ChannelGroup(name, num_channels, layers, internal, parts, "", tuple(edits))


def _holds_channels(target: nn.Module | nn.Parameter) -> bool:
    if isinstance(target, nn.Parameter | ZeroPadShortcut):
        return True
    tensors = [*target.parameters(recurse=False), *target.buffers(recurse=False)]
    return bool(tensors) or isinstance(target, BATCH_NORMS)


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.out_channels > 1


def _trace_shapes(model: nn.Module, example_input: Tensor) -> tuple[dict[str, int], set[str]]:
    """Pixels of each layer's output, and the layers whose output is the model's own."""
    spatial: dict[str, int] = {}
    order: list[str] = []
    made: dict[int, str] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                spatial[name] = _num_pixels(module, output)
                order.append(name)
                made[id(output)] = name
                keep.append(output)

        return record

    keep: list[Tensor] = []  # so that no id is used twice
    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, PRODUCERS)
    ]
    try:
        with torch.no_grad():
            result = model(example_input)
    finally:
        for handle in handles:
            handle.remove()
    outputs = {made[id(t)] for t in _tensors(result) if id(t) in made}
    return spatial, outputs or set(order[-1:])


def _num_pixels(module: nn.Module, output: Tensor) -> int:
    if isinstance(module, nn.Linear):  # channels last
        return output.shape[1:-1].numel()
    return output.shape[2:].numel()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _provable(
    model: nn.Module, groups: Sequence[ChannelGroup], example_input: Tensor
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Prunes all groups to one half and runs the result; if that breaks, tries each one alone."""
    if _failure(model, groups, example_input) is None:
        return list(groups), {}
    good, broken = [], {}
    for group in groups:
        reason = _failure(model, [group], example_input)
        if reason is None:
            good.append(group)
        else:
            broken[group.name] = f"the model breaks without its channels: {reason}"
    reason = _failure(model, good, example_input)
    if reason is not None:
        return [], {**broken, **{g.name: f"the groups break together: {reason}" for g in good}}
    return good, broken


def _failure(
    model: nn.Module, groups: Sequence[ChannelGroup], example_input: Tensor
) -> str | None:
    kept = {}
    for group in groups:
        size = group.num_channels // group.parts
        half = range(max(1, size // 2))
        kept[group.name] = tuple(p * size + i for p in range(group.parts) for i in half)
    plan = PruningPlan(tuple(groups), {})
    try:
        pruned = apply(copy.deepcopy(model).eval(), plan, Recipe((), kept))
        with torch.no_grad():
            pruned(example_input[:1])
    except Exception as error:  # any failure of a foreign model is this group's reason
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None
