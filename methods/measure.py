"""MACs, parameters, memory and latency of a model."""

from __future__ import annotations

import dataclasses
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .trace import evaluating

MIB = 2**20
BURST = 4  # runs of one model before the other's turn
WARMUP_ROUNDS = 5


@dataclass(frozen=True)
class Latency:
    """A model's latency beside the dense model's, from paired runs.

    Attributes:
        speedup: Median over the rounds of (dense seconds / model seconds).
        speedup_low: Lower end of the 95 % interval of that median (order statistics).
        speedup_high: Upper end.
        latency_ms: Dense reference latency / speedup.
        latency_ms_p10: The same at the 10th percentile of the rounds.
        latency_ms_p90: The same at the 90th percentile.
    """

    speedup: float
    speedup_low: float
    speedup_high: float
    latency_ms: float
    latency_ms_p10: float
    latency_ms_p90: float

    def at(self, reference_ms: float) -> Latency:
        """The same ratios on a device where the dense model takes `reference_ms`."""
        factor = reference_ms / (self.speedup * self.latency_ms)
        return dataclasses.replace(
            self,
            latency_ms=factor * self.latency_ms,
            latency_ms_p10=factor * self.latency_ms_p10,
            latency_ms_p90=factor * self.latency_ms_p90,
        )


def count_macs(model: nn.Module, example_input: Tensor) -> int:
    """Multiply-adds of one example: half of what torch's FlopCounterMode counts.

    Convolutions, linear layers and attention products count; normalisation, activations and
    pooling do not.

    Args:
        model: Run once in eval mode.
        example_input: [B, C, H, W]; the first example is used.
    """
    with evaluating(model), torch.no_grad(), _Flops() as counter:
        model(example_input[:1])
    return int(counter.total) // 2


def count_params(model: nn.Module) -> int:
    """Number of parameters (buffers do not count)."""
    return sum(p.numel() for p in model.parameters())


def peak_memory_mib(model: nn.Module, example_input: Tensor) -> float:
    """Weights plus the most activation memory that is alive at once in one inference, in MiB.

    Counted from the tensors' storages as torch's dispatcher makes and frees them, so it does not
    depend on the allocator or on what else the process holds. Scratch memory inside kernels is
    not seen.

    Args:
        model: Run once in eval mode.
        example_input: The batch to run, [B, C, H, W].
    """
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    live = _LiveStorages(model, example_input)
    with evaluating(model), torch.inference_mode(), live:
        model(example_input)
    return float(weights + example_input.nbytes + live.peak) / MIB


def reference_latency_ms(
    model: nn.Module, example_input: Tensor, *, threads: int = 1, runs: int = 200
) -> float:
    """Median latency of the dense model, measured once a run; the unit of all `latency_ms`.

    The best of three medians: a busy neighbour can only add time.

    Args:
        model: The dense model, on the device of `example_input`.
        example_input: The batch to run, [B, C, H, W].
        threads: Torch threads; restored afterwards.
        runs: Timed runs for each of the three medians.
    """
    with timing(threads, model):
        run = runner(model, example_input)
        warm_up(run)
        return 1000 * min(statistics.median(run() for _ in range(runs)) for _ in range(3))


def paired_latency(
    model: nn.Module,
    dense: nn.Module,
    example_input: Tensor,
    *,
    reference_ms: float,
    threads: int = 1,
    runs: int = 200,
) -> Latency:
    """Latency of `model` from runs interleaved with the dense model's, so that drift cancels.

    Rounds of a few runs of each model, in alternating order; each round gives one ratio.

    Args:
        model: The pruned model, on the device of `example_input`.
        dense: The dense model, on the same device.
        example_input: The batch to run, [B, C, H, W].
        reference_ms: The dense model's latency, from `reference_latency_ms`.
        threads: Torch threads; restored afterwards.
        runs: Timed runs of each model.
    """
    with timing(threads, model, dense):
        run_model, run_dense = runner(model, example_input), runner(dense, example_input)
        warm_up(run_model)
        warm_up(run_dense)
        ratios = []
        for i in range(max(3, runs // BURST)):
            first, second = (run_dense, run_model) if i % 2 else (run_model, run_dense)
            a, b = burst(first), burst(second)
            ratios.append(a / b if i % 2 else b / a)
    low, high = _median_interval(ratios)
    p10, median, p90 = np.percentile(ratios, [10, 50, 90])
    return Latency(
        speedup=float(median),
        speedup_low=low,
        speedup_high=high,
        latency_ms=reference_ms / float(median),
        latency_ms_p10=reference_ms / float(p90),
        latency_ms_p90=reference_ms / float(p10),
    )


# --- timing ----------------------------------------------------------------------------------


def runner(model: nn.Module, example_input: Tensor) -> Callable[[], float]:
    """A function that runs the model once and returns the seconds it took."""

    def synchronize() -> None:
        if example_input.is_cuda:
            torch.cuda.synchronize(example_input.device)

    def run() -> float:
        synchronize()
        start = time.perf_counter()
        model(example_input)
        synchronize()
        return time.perf_counter() - start

    return run


def burst(run: Callable[[], float]) -> float:
    """Seconds of a few runs."""
    return sum(run() for _ in range(BURST))


def warm_up(run: Callable[[], float]) -> None:
    """Runs without looking at the clock."""
    for _ in range(WARMUP_ROUNDS * BURST):
        run()


def _median_interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the median by order statistics (normal approximation of the ranks)."""
    ordered = sorted(values)
    n = len(ordered)
    half = 0.98 * n**0.5
    return ordered[max(0, int(n / 2 - half))], ordered[min(n - 1, int(n / 2 + half))]


@contextmanager
def timing(threads: int, *models: nn.Module) -> Iterator[None]:
    """Eval and inference mode with a number of torch threads; all of it is restored."""
    before = torch.get_num_threads()
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        stack.callback(torch.set_num_threads, before)
        torch.set_num_threads(threads)
        with torch.inference_mode():
            yield


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not asked for: the first use would import the compiler, 3 s in each process."""
        return False


class _Flops(_Mode):  # type: ignore[no-untyped-call]
    """FlopCounterMode without its table of modules, in a third of the time.

    It needs no_grad: inference_mode shows operators before they are taken apart.
    """

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # and Triton, which a probe spares

        super().__init__()  # type: ignore[no-untyped-call]
        self._formulas = flop_registry
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=result))
        return result


class _LiveStorages(_Mode):  # type: ignore[no-untyped-call]
    """Follows the bytes of all storages that are made while it is active."""

    def __init__(self, model: nn.Module, example_input: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        known = [*model.parameters(), *model.buffers(), example_input]
        self._seen = {t.untyped_storage().data_ptr() for t in known}
        self._now = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        pointer, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or pointer in self._seen:
            return
        self._seen.add(pointer)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, pointer, size)

    def _free(self, pointer: int, size: int) -> None:
        self._seen.discard(pointer)
        self._now -= size
