"""Latency of layers measured alone at several widths, and of a model as the sum of its layers.

A lookup table of measured layers, as in NetAdapt (Yang et al. 2018, arXiv:1804.03230, section
3.3), with interpolation between the widths.
"""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .layer_costs import CONVOLUTIONS, LayerCall
from .measure import burst, runner, timing, warm_up

FRACTIONS = (0.25, 0.5, 1.0)  # widths that are measured, of inputs and of outputs


@dataclass(frozen=True)
class LayerLatencies:
    """The share of each layer in the dense model's latency, and how it shrinks with widths.

    Attributes:
        shares: Of each layer of `LayerCosts.calls` in the sum of all layers' dense latencies.
        ratios: Of each layer its latency at `FRACTIONS` of inputs (rows) and of outputs, relative
            to the dense one, [3, 3].
    """

    shares: tuple[float, ...]
    ratios: tuple[tuple[tuple[float, ...], ...], ...]

    def fraction(
        self,
        outputs: NDArray[np.float64],
        inputs: NDArray[np.float64],
        living: NDArray[np.float64],
    ) -> float:
        """Latency of a model relative to the dense one, in 0..1.

        Args:
            outputs: Fractions of output channels that stay, [layers].
            inputs: Likewise of input channels.
            living: 1 for a layer that is there, 0 for one in a dropped block.
        """
        total = sum(
            share * _interpolated(ratios, float(i), float(o))
            for share, ratios, o, i, alive in zip(
                self.shares, self.ratios, outputs, inputs, living, strict=True
            )
            if alive
        )
        return min(1.0, max(0.0, total))


def measure_layers(
    model: nn.Module,
    calls: Sequence[LayerCall],
    *,
    batch_size: int = 1,
    threads: int = 1,
    rounds: int = 10,
) -> LayerLatencies:
    """Measures every different layer alone, its narrower versions interleaved with itself.

    Each is run with a batch norm and a ReLU behind it where it is a convolution: narrower layers
    make these cheaper too.

    Args:
        model: The dense model, on the device to measure; left as it was.
        calls: Its layers.
        batch_size: Images a run.
        threads: Torch threads; restored afterwards.
        rounds: Bursts of each version.
    """
    known: dict[tuple[object, ...], tuple[float, tuple[tuple[float, ...], ...]]] = {}
    keys = []
    for call in calls:
        layer = model.get_submodule(call.name)
        key = (str(layer), call.input)
        if key not in known:
            known[key] = _measured(layer, call, batch_size, threads, rounds)
        keys.append(key)
    total = sum(known[key][0] for key in keys)
    return LayerLatencies(
        tuple(known[key][0] / total for key in keys), tuple(known[key][1] for key in keys)
    )


def _measured(
    layer: nn.Module, call: LayerCall, batch_size: int, threads: int, rounds: int
) -> tuple[float, tuple[tuple[float, ...], ...]]:
    """Seconds of the dense layer, and the ratios of its narrower versions to it."""
    parameter = next(layer.parameters())
    versions = {
        (i, o): _version(layer, i, o, depthwise=call.depthwise)
        for i in FRACTIONS
        for o in FRACTIONS
        if not call.depthwise or i == 1.0
    }
    runs = {}
    modules = [module.to(parameter.device) for module, _ in versions.values()]
    with timing(threads, *modules):
        for key, (module, width) in versions.items():
            linear = isinstance(layer, nn.Linear)
            shape = (*call.input[:-1], width) if linear else (width, *call.input[1:])
            example = torch.randn(batch_size, *shape, device=parameter.device)
            runs[key] = runner(module, example)
            warm_up(runs[key])
        times: Mapping[tuple[float, float], list[float]] = {key: [] for key in runs}
        for _ in range(rounds):
            for key, run in runs.items():
                times[key].append(burst(run))
    dense = statistics.median(times[1.0, 1.0])
    ratio = {
        key: statistics.median(a / b for a, b in zip(found, times[1.0, 1.0], strict=True))
        for key, found in times.items()
    }
    rows = tuple(
        tuple(ratio[1.0 if call.depthwise else i, o] for o in FRACTIONS) for i in FRACTIONS
    )
    return dense, rows


def _version(
    layer: nn.Module, inputs: float, outputs: float, *, depthwise: bool
) -> tuple[nn.Module, int]:
    """The layer with a fraction of its channels, and its number of inputs."""
    if isinstance(layer, nn.Linear):
        width = max(1, round(inputs * layer.in_features))
        return nn.Linear(width, max(1, round(outputs * layer.out_features))), width
    assert isinstance(layer, CONVOLUTIONS)
    groups = layer.groups
    made = max(1, round(outputs * layer.out_channels / groups)) * groups
    width = max(1, round(inputs * layer.in_channels / groups)) * groups
    if depthwise:
        made = width = groups = max(1, round(outputs * layer.in_channels))
    make: Any = next(kind for kind in CONVOLUTIONS if isinstance(layer, kind))
    new = make(
        width,
        made,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=groups,
        bias=layer.bias is not None,
    )
    norms: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    norm = norms[len(layer.kernel_size) - 1](made)
    return nn.Sequential(new, norm, nn.ReLU(inplace=True)), width


def _interpolated(ratios: tuple[tuple[float, ...], ...], inputs: float, outputs: float) -> float:
    """Bilinear, and linear below the narrowest width."""
    row, x = _cell(inputs)
    column, y = _cell(outputs)
    near = (1 - y) * ratios[row][column] + y * ratios[row][column + 1]
    far = (1 - y) * ratios[row + 1][column] + y * ratios[row + 1][column + 1]
    return max(0.0, (1 - x) * near + x * far)


def _cell(fraction: float) -> tuple[int, float]:
    left = min(max(bisect.bisect_right(FRACTIONS, fraction) - 1, 0), len(FRACTIONS) - 2)
    return left, (fraction - FRACTIONS[left]) / (FRACTIONS[left + 1] - FRACTIONS[left])
