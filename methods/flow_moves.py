"""Moves labels as functions move data: reshapes, concatenations, splits, paddings, indexing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .flow import Division, Labelled
from .labels import NONE, along, divided, spread, varies
from .outputs import tensors_of

_RESHAPES = {"view", "reshape", "view_as", "reshape_as", "flatten", "unflatten"}
_SPLITS = {"chunk", "split", "split_with_sizes", "tensor_split"}
_CATS = {"cat", "concat", "concatenate"}
MOVES = (
    _RESHAPES
    | _SPLITS
    | _CATS
    | {
        *("permute", "transpose", "swapaxes", "movedim", "moveaxis", "squeeze", "unsqueeze", "t"),
        *("stack", "unbind", "getitem", "narrow", "select", "index_select", "gather", "roll"),
        *("expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave", "flip"),
        *("pad", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "get"),
    }
)


class Moves(Labelled):
    """Follows channels through functions that move data and compute nothing."""

    def move(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        results: Sequence[Tensor],
    ) -> None:
        """Moves the labels as the function moved the data."""
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(x, Tensor) and not self.has(x):
            return  # only an index, or the shape, comes from a labelled tensor
        if not any(result.is_floating_point() for result in results):
            return
        try:
            if name in _RESHAPES:
                found: Any = self._reshape(name, x, results[0])
            elif name in _CATS:
                found = self._cat(x, kwargs.get("dim", args[1] if len(args) > 1 else 0))
            elif name == "pad":
                found = self._pad(x, args[1] if len(args) > 1 else kwargs["pad"], kwargs)
            else:
                moved_args, moved_kwargs = tree_map(self._as_labels, (args, kwargs))
                found = func(*moved_args, **moved_kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError):
            found = ()
        labels = list(tensors_of(found))
        if [t.shape for t in labels] != [t.shape for t in results]:
            given = list(tensors_of((args, kwargs)))
            return self.lose(
                given, f"is moved in a way that is not understood ({name} in {self.where})"
            )
        for result, own in zip(results, labels, strict=True):
            self.labels[result] = own
        if name in _SPLITS:
            self._split(x, args, kwargs, results)

    def _as_labels(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value.cpu() if isinstance(value, Tensor) else value  # an index, a mask
        if self.has(value):
            return self.labels[value]
        return torch.full((1,) * value.ndim, NONE).expand(value.shape)

    def _reshape(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        labels: Tensor = self.labels[x]
        if result.numel():
            for dim, parts in divided(x.shape, result.shape):
                self._divide(labels, dim, parts)
        return labels.reshape(result.shape)

    def _divide(self, labels: Tensor, dim: int, parts: int) -> None:
        if not varies(labels, dim):
            return
        vector = along(labels, dim)
        reason = (
            f"is split or shuffled by position with channels of other layers (in {self.where})"
        )
        if vector is None:
            self.flow.lost.append((labels[labels != NONE], reason))
        else:
            self.flow.divisions.append(Division(vector, parts, reason))

    def _split(
        self, x: Tensor, args: Sequence[Any], kwargs: Any, results: Sequence[Tensor]
    ) -> None:
        dim = int(kwargs.get("dim", args[2] if len(args) > 2 else 0))
        if len({result.shape[dim] for result in results}) > 1:
            if varies(self.labels[x], dim):
                self.lose([x], f"is split into unequal parts (in {self.where})")
        elif len(results) > 1:
            self._divide(self.labels[x], dim, len(results))

    def _cat(self, given: Sequence[Tensor], dim: int) -> Tensor:
        """Along another dimension than the channels', the channels of all must stay the same."""
        dim %= given[0].ndim
        parts = [self._as_labels(tensor) for tensor in given]
        first: Tensor | None = None
        for index, labels in enumerate(parts):
            for other in range(labels.ndim):
                if other == dim or not varies(labels, other):
                    continue
                vector = along(labels, other)
                if vector is None:
                    continue
                if first is None or first.shape != vector.shape:
                    first = vector
                else:
                    self.couple(first, vector)
                parts[index] = spread(first, labels.shape, other)
        return torch.cat(parts, dim)

    def _pad(self, x: Tensor, pad: Sequence[int], kwargs: Mapping[str, Any]) -> Tensor:
        labels: Tensor = self.labels[x]
        padded = [x.ndim - 1 - k // 2 for k, size in enumerate(pad) if size]
        if any(varies(labels, dim) for dim in padded):
            self.lose([x], f"gets constant channels added (in {self.where})")
        if kwargs.get("mode", "constant") == "constant":
            return nn.functional.pad(labels.contiguous(), list(pad), value=NONE)
        vector = along(labels, 1)
        assert vector is not None
        shape = list(x.shape)
        for k, size in enumerate(pad):
            shape[x.ndim - 1 - k // 2] += size
        return spread(vector, shape, 1)

    def set_items(self, x: Tensor, index: Any, value: Any) -> None:
        """Rows of `x` are overwritten, as RoI pooling over several levels does."""
        if not isinstance(value, Tensor) or not self.has(value) or value.numel() == 0:
            return
        new = along(self.labels[value], 1) if value.ndim > 1 else None
        old = along(self.labels[x], 1) if self.has(x) and x.ndim > 1 else None
        if new is None or x.ndim != value.ndim or len(new) != x.shape[1]:
            self.lose([x, value], f"is written into another tensor (in {self.where})")
        elif old is not None:
            self.couple(old, new)
        else:
            self.labels[x] = spread(new, x.shape, 1)
