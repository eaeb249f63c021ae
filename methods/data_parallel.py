"""Training on several devices of one process: each batch is split, and gradients are averaged.

As in torch's data parallelism, batch norms see their own share of a batch, and the first device's
running statistics are the model's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

LEAST_IMAGES = 2  # of a device: batch norm cannot train on one

LossOf = Callable[[nn.Module, nn.Module | None, Tensor, Any], Tensor]


class Replicas:
    """A model with copies of it on further devices, while it is trained.

    Args:
        model: On the first device, in train mode; gradients are left in it.
        teacher: Copied likewise; None where there is none.
        devices: The further devices; none for plain training.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, devices: Sequence[torch.device]
    ) -> None:
        self._models = [model, *(copy.deepcopy(model).to(device) for device in devices)]
        self._parameters = [list(one.parameters()) for one in self._models]
        self._teachers = [teacher, *(_copy(teacher, device) for device in devices)]
        self._devices = [None, *devices]
        self._pool = ThreadPoolExecutor(max(1, len(devices)), thread_name_prefix="replica")

    def backward(self, loss_of: LossOf, images: Tensor, target: Any) -> Tensor:
        """Sets the gradients of a batch's mean loss, and returns that loss, detached.

        Args:
            loss_of: The mean loss of (model, teacher, images, target).
            images: [B, C, H, W], on the first device.
            target: Of each image: a tensor [B, ...], likewise, or a list of dicts of tensors.
        """
        for parameters in self._parameters:
            for parameter in parameters:
                parameter.grad = None
        count = min(len(self._models), max(1, len(images) // LEAST_IMAGES))
        if count == 1:
            loss = loss_of(self._models[0], self._teachers[0], images, target)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()
        shares = _shares(images, target, count)
        self._broadcast(count)
        others = [
            self._pool.submit(self._backward, n, loss_of, *shares[n], len(images))
            for n in range(1, count)
        ]
        losses = [self._backward(0, loss_of, *shares[0], len(images))]
        losses += [other.result().to(images.device) for other in others]
        self._reduce(count)
        return torch.stack(losses).sum()

    def close(self) -> None:
        """Lets go of the copies."""
        self._pool.shutdown()
        del self._models[1:], self._parameters[1:], self._teachers[1:]

    def _backward(
        self, n: int, loss_of: LossOf, images: Tensor, target: Any, num_images: int
    ) -> Tensor:
        """One device's part of the loss and of its gradients."""
        device = self._devices[n]
        on_device = (
            torch.cuda.device(device) if device and device.type == "cuda" else nullcontext()
        )
        with on_device:
            if device is not None:
                images = images.to(device, non_blocking=True)
                target = tree_map(lambda one: one.to(device, non_blocking=True), target)
            loss = loss_of(self._models[n], self._teachers[n], images, target)
            loss = loss * (len(images) / num_images)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

    @torch.no_grad()
    def _broadcast(self, count: int) -> None:
        for parameters in self._parameters[1:count]:
            for mine, first in zip(parameters, self._parameters[0], strict=True):
                mine.copy_(first, non_blocking=True)

    def _reduce(self, count: int) -> None:
        for parameters in self._parameters[1:count]:
            for mine, first in zip(parameters, self._parameters[0], strict=True):
                if mine.grad is not None:
                    grad = mine.grad.to(first.device, non_blocking=True)
                    first.grad = grad if first.grad is None else first.grad + grad


def _copy(module: nn.Module | None, device: torch.device) -> nn.Module | None:
    return None if module is None else copy.deepcopy(module).to(device)


def _shares(images: Tensor, target: Any, count: int) -> list[tuple[Tensor, Any]]:
    """Each device's part of a batch."""
    parts = images.tensor_split(count)
    bounds = pairwise(accumulate(map(len, parts), initial=0))
    return [(part, target[low:high]) for part, (low, high) in zip(parts, bounds, strict=True)]
