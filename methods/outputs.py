"""What models return: a tensor, or several by name or in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

MAIN = "out"  # what torchvision's segmentation models call their logits, beside `aux`


def unwrapped(output: Any) -> Any:
    """The logits of a segmentation model that returns a mapping; any other output as it is."""
    return output.get(MAIN) if isinstance(output, Mapping) else output


def main_output(output: Any) -> Tensor:
    """The tensor that a model is used for: its only output, or the one called `out`.

    Raises:
        ValueError: If there is no such tensor.
    """
    found = unwrapped(output)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"`model` must return one tensor, or a mapping with one called `{MAIN}`: it returns "
            f"a {type(output).__name__}. Use a method that does not read outputs."
        )
    return found


def tensors_of(output: Any) -> Iterator[Tensor]:
    """All tensors of an output, in its order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for item in output.values():
            yield from tensors_of(item)
    elif isinstance(output, list | tuple):
        for item in output:
            yield from tensors_of(item)
