"""Runs a model without some of its blocks, from one of them on.

Removing a block leaves every activation before it unchanged. The model's own forward runs, but
each module that would finish before the block starts returns the output that it had in an earlier
run: what remains is the suffix, and its results are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .names import unknown_name
from .outputs import tensors_of
from .trace import Call, trace_calls

MAX_CACHE_BYTES = 2**30  # of the outputs kept for one batch

Outputs = dict[str, Tensor]


class Replay:
    """A model and what its trace says about where each block starts.

    Args:
        model: In eval mode, with gradients off, as long as this object is used; never changed.
        blocks: Names of modules that are called once, with one tensor, and return one.
        example_input: A few images, [B, C, H, W].

    Raises:
        ValueError: If a block is unknown, or is called otherwise.

    Attributes:
        blocks: In the order of their calls.
        max_images: Largest batch whose cached outputs stay below `MAX_CACHE_BYTES`.
        exact: Whether a run from a block on gave what a whole run gives, on the example.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], example_input: Tensor) -> None:
        calls = trace_calls(model, example_input)
        for name in blocks:
            _check_block(name, calls)
        self._model = model
        self._modules = dict(model.named_modules())
        self.blocks = tuple(sorted(set(blocks), key=lambda name: calls[name].start))
        self._before = {name: _finished_before(name, calls) for name in self.blocks}
        self._cached = sorted({name for names in self._before.values() for name in names})
        self._volatile: set[str] = set()  # modules whose output a later module overwrites
        outputs = self._probe(example_input)
        per_image = sum({t.data_ptr(): t.nbytes for t in outputs.values()}.values())
        per_image //= len(example_input)
        self.max_images = max(1, MAX_CACHE_BYTES // max(1, per_image))
        self.exact = self._is_exact(example_input)

    def run(
        self,
        images: Tensor,
        removed: Sequence[str],
        *,
        start: str | None = None,
        outputs: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """Runs the model without some blocks.

        Args:
            images: [B, C, H, W].
            removed: The blocks to leave out.
            start: The block to start from; the whole model by default.
            outputs: From a `record` of these images, without `removed` except what comes at or
                after `start`.

        Returns:
            What the model returns.
        """
        forwards: dict[str, Callable[..., Tensor]] = {name: _identity for name in removed}
        if start is not None:
            assert outputs is not None
            known = [name for name in self._before[start] if name in outputs]
            forwards |= {name: self._stub(name, outputs[name]) for name in known}
        with _forwards_replaced({self._modules[n]: f for n, f in forwards.items()}):
            result: Any = self._model(images.clone())  # a model may overwrite its input
        return result

    def record(
        self,
        images: Tensor,
        removed: Sequence[str],
        *,
        start: str | None = None,
        outputs: Mapping[str, Tensor] | None = None,
    ) -> tuple[Any, Outputs]:
        """As `run`, and keeps the outputs that runs from a later block need."""
        recorded: Outputs = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                recorded[name] = output.clone() if name in self._volatile else output

            return hook

        with ExitStack() as stack:
            for name in self._cached:
                handle = self._modules[name].register_forward_hook(keep(name))
                stack.callback(handle.remove)
            result = self.run(images, removed, start=start, outputs=outputs)
        return result, recorded

    def _stub(self, name: str, output: Tensor) -> Callable[..., Tensor]:
        copy = name in self._volatile
        return lambda *args, **kwargs: output.clone() if copy else output

    def _probe(self, images: Tensor) -> Outputs:
        """Finds the outputs that are overwritten in place after their module has returned."""
        versions: dict[str, int] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                versions[name] = output._version

            return hook

        with ExitStack() as stack:
            for name in self._cached:
                handle = self._modules[name].register_forward_hook(note(name))
                stack.callback(handle.remove)
            _, outputs = self.record(images, ())
        self._volatile = {n for n, output in outputs.items() if output._version != versions[n]}
        return outputs

    def _is_exact(self, images: Tensor) -> bool:
        """Compares both ways of running for the last block in each parent."""
        _, outputs = self.record(images, ())
        last = {name.rpartition(".")[0]: name for name in self.blocks}
        return all(
            _equal(self.run(images, [name], start=name, outputs=outputs), self.run(images, [name]))
            for name in last.values()
        )


def _identity(x: Tensor) -> Tensor:
    return x.clone()  # a block returns a new tensor: what follows may overwrite it


@contextmanager
def _forwards_replaced(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Gives module instances another forward, and their own back at the end."""
    own: dict[nn.Module, Any] = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward


def _check_block(name: str, calls: Mapping[str, Call]) -> None:
    if name not in calls:
        raise ValueError(unknown_name("blocks", name, [key for key in calls if key]))
    if calls[name].count > 1 or not calls[name].single:
        raise ValueError(
            f"`blocks` (={name}) must be called once, with one tensor, and return one: an "
            "identity cannot take its place. Use names that `removable_blocks` returns."
        )


def _finished_before(block: str, calls: Mapping[str, Call]) -> tuple[str, ...]:
    """The outermost modules that are called once and have returned when the block starts."""
    names: list[str] = []
    end = -1
    for name, call in calls.items():  # in order of their starts
        if call.count == 1 and call.returns_tensor and end < call.end < calls[block].start:
            names.append(name)
            end = call.end
    return tuple(names)


def _equal(one: Any, other: Any) -> bool:
    """Whether two outputs are the same to the last bit."""
    firsts, seconds = list(tensors_of(one)), list(tensors_of(other))
    same_number = len(firsts) == len(seconds)
    return same_number and all(map(torch.equal, firsts, seconds))
