"""Labels: an integer tensor beside a tensor that says which channel each element belongs to.

Labels are expanded, not stored, along the dimensions that do not matter (batch, height, width),
so they cost little. `NONE` marks elements that belong to no channel, such as padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

NONE = -1
_SHIFT = 31  # two labels in one 64-bit number


def spread(vector: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """Labels of a tensor of `shape` whose channels, [n], run along `dim`."""
    view = [1] * len(shape)
    view[dim] = -1
    return vector.view(view).expand(tuple(shape))


def along(labels: Tensor, dim: int) -> Tensor | None:
    """The label of each index of a dimension, [n]; None where that is not one label.

    Elements without a label do not disagree.
    """
    if labels.numel() == 0:
        return None
    rows = _thin(labels, dim).movedim(dim, 0).flatten(1)
    top = rows.amax(1)
    return top if bool(((rows == top[:, None]) | (rows == NONE)).all()) else None


def varies(labels: Tensor, dim: int) -> bool:
    """Whether different indices of a dimension belong to different channels."""
    if labels.numel() == 0 or labels.shape[dim] == 1 or labels.stride(dim) == 0:
        return False
    rows = _thin(labels, dim).movedim(dim, 0).flatten(1)
    return bool(((rows != rows.amax(0)) & (rows != NONE)).any())


def overlay(one: Tensor, other: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Labels of an elementwise operation's result, and the labels that met in it.

    Args:
        one: Labels that broadcast to `shape`; the result has these where there are both.
        other: Likewise.
        shape: Of the result.

    Returns:
        (labels, pairs of met labels, [2, n]).
    """
    one, other = one.expand(tuple(shape)), other.expand(tuple(shape))
    for dim in range(one.ndim):
        if one.stride(dim) == other.stride(dim) == 0 and one.shape[dim] > 1:
            one, other = one.narrow(dim, 0, 1), other.narrow(dim, 0, 1)
    both = (one != NONE) & (other != NONE)
    codes = torch.unique((one[both] << _SHIFT) | other[both])
    pairs = torch.stack([codes >> _SHIFT, codes & (2**_SHIFT - 1)])
    return torch.where(one != NONE, one, other).expand(tuple(shape)), pairs


def divided(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Dimensions that a reshape cuts up, and into how many pieces each.

    >>> list(divided((1, 8, 5, 5), (1, 2, 4, 5, 5)))
    [(1, 2)]
    """
    i = j = 0
    while i < len(before) and j < len(after):
        ins, outs = [i], [j]
        size_in, size_out = before[i], after[j]
        while size_in != size_out:
            if size_in < size_out:
                i += 1
                ins.append(i)
                size_in *= before[i]
            else:
                j += 1
                outs.append(j)
                size_out *= after[j]
        wide = [dim for dim in ins if before[dim] > 1]
        pieces = [after[dim] for dim in outs if after[dim] > 1]
        if len(wide) == 1 and len(pieces) > 1:
            yield wide[0], pieces[0]
        i, j = i + 1, j + 1


def _thin(labels: Tensor, dim: int) -> Tensor:
    """One index of every other dimension along which the labels are merely repeated."""
    for other in range(labels.ndim):
        if other != dim % labels.ndim and labels.stride(other) == 0:
            labels = labels.narrow(other, 0, 1)
    return labels
