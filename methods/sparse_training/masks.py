"""Which channels are important, and what sparse training adds to a gradient (DSD, eqs. 5-12)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Metric = Literal["abs_gradient", "abs_scale", "product", "abs_product"]
MetricUpdate = Literal["iteration", "epoch", "once"]
Threshold = Literal["global", "layer"]
Action = Literal["none", "penalize", "reward"]

METRICS: dict[Metric, Callable[[Tensor, Tensor], Tensor]] = {
    "abs_gradient": lambda tau, grad: grad.abs(),
    "abs_scale": lambda tau, grad: tau.abs(),
    "product": lambda tau, grad: grad * tau,
    "abs_product": lambda tau, grad: (grad * tau).abs(),
}
FACTORS: dict[Action, float] = {"none": 0.0, "penalize": 1.0, "reward": -1.0}


class ImportantSet:
    """The important channels, E; all others are redundant, N.

    E holds the n1 = int(n (1 - q)) channels of the largest metric; equal ones by index. With the
    threshold `layer` every norm has its own n1, at least 1.

    Args:
        widths: Channels of each norm.
        q: Fraction to be removed, between 0 and 1.
        metric: A function of (tau, gradient of tau); a key of `METRICS`.
        metric_update: When E is chosen anew: each iteration, at the first of each epoch, or once.
        ema: Share of the past in the running mean of the metric over the iterations; 0 for none.
        threshold: Over all channels, or in each norm.
        device: Where the scales live.

    Attributes:
        mask: True for an important channel, bool [n]; None before the first update. Never
            changed in place.
    """

    def __init__(
        self,
        widths: Sequence[int],
        q: float,
        *,
        metric: Metric = "abs_product",
        metric_update: MetricUpdate = "iteration",
        ema: float = 0.0,
        threshold: Threshold = "global",
        device: torch.device | str = "cpu",
    ) -> None:
        parts = [sum(widths)] if threshold == "global" else list(widths)
        least = 0 if threshold == "global" else 1
        counts = [max(least, num_important(part, q)) for part in parts]
        part_ids = [torch.full((part,), index) for index, part in enumerate(parts)]
        slots = [torch.arange(part) < n for part, n in zip(parts, counts, strict=True)]
        self.num_important = sum(counts)
        self.mask: Tensor | None = None
        self._parts = torch.cat(part_ids).to(device)
        self._slots = torch.cat(slots).to(device)
        self._metric, self._ema = METRICS[metric], ema
        self._metric_update = metric_update
        self._average: Tensor | None = None

    def update(self, tau: Tensor, grad: Tensor, *, new_epoch: bool) -> Tensor:
        """Takes one iteration's scales and gradients, [n] each.

        Args:
            tau: Scales of the batch norms.
            grad: Their gradients, without any penalty.
            new_epoch: Whether this is the first iteration of an epoch.

        Returns:
            `mask`.
        """
        value = self._metric(tau, grad)
        if self._average is not None and self._ema > 0:
            value = torch.lerp(value, self._average, self._ema)
        self._average = value
        due = self._metric_update == "iteration" or (self._metric_update == "epoch" and new_epoch)
        if self.mask is None or due:
            self.mask = self._largest(value)
        return self.mask

    def _largest(self, value: Tensor) -> Tensor:
        """Membership in the top of each part; stable sorts, so that the lower index wins a tie."""
        order = torch.argsort(value, descending=True, stable=True)
        order = order[torch.argsort(self._parts[order], stable=True)]
        return torch.empty_like(self._slots).scatter_(0, order, self._slots)


def num_important(num_channels: int, q: float) -> int:
    """How many channels stay: int(n (1 - q)), eq. 6."""
    return math.floor(num_channels * (1 - q) + 1e-9)  # 100 * (1 - .43) is 56.99999999999999


def sparsity_gradient(
    values: Tensor, important: Tensor, on_important: Action, on_redundant: Action
) -> Tensor:
    """What lambda multiplies in the gradient: sign(v), -sign(v) or 0 (eqs. 8-12).

    Args:
        values: Scales or shifts, [n].
        important: E, bool [n].
        on_important: `penalize` pulls values towards zero, `reward` pushes them away.
        on_redundant: Likewise for the rest.

    Returns:
        The subgradient, [n]; 0 where the value is 0.
    """
    if on_important == on_redundant:
        return values.sign() * FACTORS[on_important]
    factors = values.new_full(values.shape, FACTORS[on_redundant])
    return values.sign() * factors.masked_fill_(important, FACTORS[on_important])
