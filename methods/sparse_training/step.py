"""From the gradients of a batch to a step of the optimizer, in either phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .channels import Channels
from .freeze import Freezer
from .history import Phase
from .masks import Action, ImportantSet, sparsity_gradient


@dataclass(frozen=True)
class Penalty:
    """What phase 1 does to scales and shifts: lambda, and an action for each set."""

    lam: float
    tau_important: Action
    tau_redundant: Action
    beta_important: Action
    beta_redundant: Action

    def add(self, channels: Channels, important: Tensor) -> None:
        """Adds the gradient of the penalty to the gradients; E is `important`, bool [n]."""
        if self.tau_important != "none" or self.tau_redundant != "none":
            edit = sparsity_gradient(
                channels.tau(), important, self.tau_important, self.tau_redundant
            )
            channels.add_to_tau_grad(self.lam * edit)
        if self.beta_important != "none" or self.beta_redundant != "none":
            edit = sparsity_gradient(
                channels.beta(), important, self.beta_important, self.beta_redundant
            )
            channels.add_to_beta_grad(self.lam * edit)


class Step:
    """Turns the gradients of a batch into a step: penalized, or with N frozen.

    Args:
        channels: The batch norms.
        important: Chooses E.
        penalty: What phase 1 adds to the gradients.
        optimizer: Steps all parameters.
        freezer_of: Freezes the redundant channels of each norm, when phase 2 begins.
    """

    def __init__(
        self,
        channels: Channels,
        important: ImportantSet,
        penalty: Penalty,
        optimizer: torch.optim.SGD,
        freezer_of: Callable[[list[Tensor]], Freezer],
    ) -> None:
        self.channels, self.optimizer = channels, optimizer
        self.mask: Tensor | None = None
        self._important, self._penalty, self._freezer_of = important, penalty, freezer_of
        self._freezer: Freezer | None = None

    def __call__(self, phase: Phase, *, new_epoch: bool) -> Tensor:
        """One step; `new_epoch` is whether the batch is the first of its pass. Gives E, [n]."""
        if phase != "finetuning" or self.mask is None:
            self.mask = self._important.update(
                self.channels.tau(), self.channels.tau_grad(), new_epoch=new_epoch
            )
        if phase != "finetuning":
            self._penalty.add(self.channels, self.mask)
            self.optimizer.step()
            return self.mask
        if self._freezer is None:
            self._freezer = self._freezer_of(self.channels.split(~self.mask))
        self._freezer.step()
        return self.mask
