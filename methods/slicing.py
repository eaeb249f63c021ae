"""Copies a model without some of its blocks, and cuts channels out of its layers.

The layers that most models are made of are cut here, both sides at once and each tensor once;
all others by torch-pruning's own functions. The results are equal.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_ATOMS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Side:
    """What one side of a layer, or one dimension of a parameter, loses.

    Attributes:
        prune: torch-pruning's function that removes it.
        dim: Dimension of a bare parameter.
        removed: Indices, [n], in any order.
    """

    prune: Callable[[Any, Sequence[int]], Any]
    dim: int
    removed: Tensor

    @property
    def outputs(self) -> bool:
        """Whether these are outputs of the layer."""
        return self.prune.__name__ == "prune_out_channels"


def clone(model: nn.Module, *, without: Iterable[str] = ()) -> nn.Module:
    """`copy.deepcopy` of a model whose modules `without` are already `nn.Identity` in the copy.

    Three times faster, because it knows how modules hold what they hold. Names that are not those
    of modules are ignored.
    """
    gone = [name for name in without if name]
    memo: dict[int, Any] = {}
    mine: list[nn.Module] = []
    for name, module in model.named_modules():
        if name in gone:
            memo[id(module)] = nn.Identity().train(module.training)
        elif _is_plain(type(module)) and not any(name.startswith(f"{block}.") for block in gone):
            memo[id(module)] = object.__new__(type(module))
            mine.append(module)
    for module in mine:
        state = module.__getstate__()  # type: ignore[no-untyped-call]
        vars(memo[id(module)]).update((key, _copied(value, memo)) for key, value in state.items())
    return copy.deepcopy(model, memo)


def slice_channels(model: nn.Module, target: str, sides: Sequence[Side]) -> None:
    """Removes channels from one layer or bare parameter of `model`, in place.

    Args:
        model: Holds it.
        target: Module name, or the full name of a bare parameter.
        sides: What goes, at most once each.
    """
    parent_name, _, leaf = target.rpartition(".")
    parent = model.get_submodule(parent_name)
    item = getattr(parent, leaf)
    if type(item) in (nn.Conv2d, nn.Linear) and getattr(item, "groups", 1) == 1:
        for side in sides:
            _cut_weighted(item, side)
    elif type(item) in BATCH_NORMS and len(sides) == 1:
        _cut_batch_norm(item, sides[0].removed)
    elif isinstance(item, nn.LayerNorm) and len(sides) == 1:
        _cut_layer_norm(item, sides[0].removed)
    elif isinstance(item, Tensor):
        for side in sides:
            stays = _stays(item.shape[side.dim], side.removed, item.device)
            setattr(parent, leaf, item := _cut_bare(item, side.dim, stays))
    else:
        for side in sides:
            side.prune.__self__.pruning_dim = side.dim  # type: ignore[attr-defined]  # its protocol
            side.prune(item, sorted(set(side.removed.tolist())))


def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether copying a module of this class is copying its attributes.

    torch's own layers have a `__setstate__`, which only mends pickles of old versions.
    """
    hooks = ("__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")
    found = [getattr(kind, name, None) for name in hooks]
    return all(hook is None or _of_torch(hook) for hook in found)


def _of_torch(hook: Any) -> bool:
    return getattr(hook, "__objclass__", None) is object or hook.__module__.startswith(
        "torch.nn.modules."
    )


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _ATOMS:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind in (dict, OrderedDict):
        made: dict[Any, Any] = kind()
        memo[id(value)] = made
        made.update((key, _copied(item, memo)) for key, item in value.items())
        return made
    if kind is Tensor and not value._is_view() and not value.requires_grad:
        memo[id(value)] = value.clone()
        return memo[id(value)]
    return copy.deepcopy(value, memo)


def _cut_weighted(layer: Any, side: Side) -> None:
    """A convolution [out, in, kh, kw] or linear layer [out, in]."""
    kind = "features" if isinstance(layer, nn.Linear) else "channels"
    width = f"out_{kind}" if side.outputs else f"in_{kind}"
    stays = _stays(getattr(layer, width), side.removed, layer.weight.device)
    setattr(layer, width, len(stays))
    layer.weight = _cut(layer.weight, 0 if side.outputs else 1, stays)
    if side.outputs and layer.bias is not None:
        layer.bias = _cut(layer.bias, 0, stays)


def _cut_batch_norm(norm: Any, removed: Tensor) -> None:
    reference = norm.weight if norm.affine else norm.running_mean
    device = reference.device if reference is not None else removed.device
    stays = _stays(norm.num_features, removed, device)
    norm.num_features = len(stays)
    if norm.track_running_stats:
        norm.running_mean = norm.running_mean[stays]
        norm.running_var = norm.running_var[stays]
    if norm.affine:
        norm.weight = _cut(norm.weight, 0, stays)
        norm.bias = _cut(norm.bias, 0, stays)


def _cut_layer_norm(norm: nn.LayerNorm, removed: Tensor) -> None:
    """Over one dimension. torch-pruning's own function does not keep the order of the channels."""
    (size,) = norm.normalized_shape
    device = norm.weight.device if norm.weight is not None else removed.device
    stays = _stays(size, removed, device)
    norm.normalized_shape = (len(stays),)
    for key in ("weight", "bias"):
        if (value := getattr(norm, key)) is not None:
            setattr(norm, key, _cut(value, 0, stays))


def _cut_bare(tensor: Tensor, dim: int, stays: Tensor) -> Tensor:
    """A parameter or buffer that lies in no layer."""
    if isinstance(tensor, nn.Parameter):
        return _cut(tensor, dim, stays)
    return tensor.index_select(dim, stays)


def _stays(size: int, removed: Tensor, device: torch.device) -> Tensor:
    mask = torch.ones(size, dtype=torch.bool)
    mask[removed] = False
    return mask.nonzero().flatten().to(device)


def _cut(parameter: nn.Parameter, dim: int, stays: Tensor) -> nn.Parameter:
    data = parameter.detach().index_select(dim, stays)
    if parameter.ndim == 4 and not parameter.is_contiguous():
        data = data.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(data, requires_grad=parameter.requires_grad)
