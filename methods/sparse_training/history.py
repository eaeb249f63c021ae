"""What sparse training saw, as plain numbers: `dataclasses.asdict` of it is JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Phase = Literal["decoupling", "finetuning", "slimming"]

NEAR_ZERO = 0.01  # what the paper's Fig. 3 shows as zero
NUM_BINS = 50


@dataclass(frozen=True)
class EpochRecord:
    """One pass over the training split, or over the share of it that a phase has left.

    Attributes:
        epoch: Number of the pass, from 1.
        phase: `decoupling` (phase 1), `finetuning` (phase 2, redundant channels frozen), or
            `slimming` (all scales penalized).
        num_images: Images of the pass.
        loss: Mean training loss, without the penalty.
        seconds: Wall time.
        important: Important channels in each bin of |tau|, at the end of the pass.
        redundant: The same for the redundant channels.
        near_zero: Fraction of all channels with |tau| below `NEAR_ZERO`.
        churn: Fraction of the channels that are in the other set than when the pass began.
    """

    epoch: int
    phase: Phase
    num_images: int
    loss: float
    seconds: float
    important: tuple[int, ...]
    redundant: tuple[int, ...]
    near_zero: float
    churn: float


@dataclass(frozen=True)
class SparseHistory:
    """The course of one sparse training.

    Attributes:
        num_channels: Channels of all batch norms.
        num_important: Those that stay.
        bin_edges: Edges of the histograms of |tau|, ascending, one more than bins. The same for
            all epochs: from 0 to the largest |tau| at the end of any.
        epochs: One record a pass.
    """

    num_channels: int
    num_important: int
    bin_edges: tuple[float, ...]
    epochs: tuple[EpochRecord, ...]


@dataclass(frozen=True)
class Snapshot:
    """What is kept of a pass until the bins are known.

    Attributes:
        phase: Of the pass.
        num_images: Likewise.
        loss: Likewise.
        seconds: Likewise.
        scales: |tau| at the end, on the CPU, [n].
        before: The important channels when the pass began, on the CPU, bool [n].
        after: The important channels at its end, likewise.
    """

    phase: Phase
    num_images: int
    loss: float
    seconds: float
    scales: Tensor
    before: Tensor
    after: Tensor


def summarize(snapshots: Sequence[Snapshot]) -> SparseHistory:
    """Puts the snapshots of all passes into shared bins."""
    largest = max(float(snapshot.scales.max()) for snapshot in snapshots)
    edges = torch.linspace(0, largest or 1.0, NUM_BINS + 1, dtype=torch.float64)

    def count(scales: Tensor) -> tuple[int, ...]:
        return tuple(int(n) for n in torch.histogram(scales.double(), edges).hist)

    records = tuple(
        EpochRecord(
            epoch=epoch,
            phase=snapshot.phase,
            num_images=snapshot.num_images,
            loss=snapshot.loss,
            seconds=snapshot.seconds,
            important=count(snapshot.scales[snapshot.after]),
            redundant=count(snapshot.scales[~snapshot.after]),
            near_zero=float((snapshot.scales < NEAR_ZERO).double().mean()),
            churn=float((snapshot.before != snapshot.after).double().mean()),
        )
        for epoch, snapshot in enumerate(snapshots, start=1)
    )
    last = snapshots[-1].after
    return SparseHistory(len(last), int(last.sum()), tuple(edges.tolist()), records)
