"""Seeded, stratified choices of image indices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def check_fractions(split: Sequence[float]) -> None:
    """Checks the fractions of training, validation and test images.

    Raises:
        ValueError: If they are not three positive numbers that sum to one.
    """
    shown = list(split)
    if len(shown) != 3 or not all(fraction > 0 for fraction in shown):
        raise ValueError(
            f"`data.split` (={shown}) must be three numbers above 0: the fractions of training, "
            "validation and test images. Use [0.7, 0.15, 0.15]."
        )
    if not math.isclose(sum(shown), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"`data.split` (={shown}) must sum to 1: it sums to {sum(shown):g}. Use "
            "[0.7, 0.15, 0.15]."
        )


def stratified_split(
    labels: Tensor, fraction: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Takes `fraction` of every class, rounded to the nearest image.

    Args:
        labels: Class of each image, int64 [N].
        fraction: Share to take, 0..1.
        generator: Source of randomness, on the CPU.

    Returns:
        (rest, taken): indices into `labels`, disjoint, together all of them, ascending.
    """
    rest, taken = [], []
    for members in _classes(labels, generator):
        count = math.floor(len(members) * fraction + 0.5)
        taken.append(members[:count])
        rest.append(members[count:])
    return _ascending(rest), _ascending(taken)


def stratified_subset(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Chooses `count` images, each class within one image of its share.

    Args:
        labels: Class of each image, int64 [N].
        count: How many; all of them when it is not below N.
        generator: Source of randomness, on the CPU.

    Returns:
        Indices into `labels`, ascending, [min(count, N)].
    """
    if count >= len(labels):
        return torch.arange(len(labels))
    classes = _classes(labels, generator)
    shares = [len(members) * count / len(labels) for members in classes]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(classes)), key=lambda c: counts[c] - shares[c])
    for index in by_remainder[: count - sum(counts)]:
        counts[index] += 1
    return _ascending([members[:n] for members, n in zip(classes, counts, strict=True)])


def _classes(labels: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Indices of each class that occurs, shuffled."""
    shuffled = torch.randperm(len(labels), generator=generator)
    return [shuffled[labels[shuffled] == label] for label in torch.unique(labels)]


def _ascending(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).sort().values
