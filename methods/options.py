"""Checks the options of a method against the types of its keyword arguments.

An option is a keyword-only argument of the method's function. Its annotation is its rule:
`bool`, `Literal[...]`, `Annotated[int | float, Bounds(low, high)]` or `Sequence[int] | None`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from .names import unknown_name


@dataclass(frozen=True)
class Bounds:
    """The least and the largest value of a numeric option, both allowed."""

    low: float
    high: float = math.inf


def options_of(function: Callable[..., Any], *, without: Sequence[str] = ()) -> dict[str, Any]:
    """The function's options and their defaults.

    Args:
        function: A method; its options are its keyword-only arguments.
        without: Keyword-only arguments that are not options.
    """
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in without
    }


def check_options(
    field: str,
    function: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    without: Sequence[str] = (),
) -> None:
    """Checks options without running the method.

    Args:
        field: What the messages call the method.
        function: The method.
        options: Option to value.
        without: See `options_of`.

    Raises:
        ValueError: If an option is unknown, or a value is not allowed.
    """
    known = options_of(function, without=without)
    types = get_type_hints(function, include_extras=True)
    for option, value in options.items():
        if option not in known:
            raise ValueError(unknown_name(f"{field}.{option}", value, known, what="an option"))
        _check(f"{field}.{option}", value, types[option])


def _check(field: str, value: Any, expected: Any) -> None:
    if get_origin(expected) is Literal:
        if value not in get_args(expected):
            raise ValueError(unknown_name(field, value, map(str, get_args(expected))))
    elif get_origin(expected) is Annotated:
        kind, bounds = get_args(expected)
        _check_number(field, value, kind, bounds)
    elif expected is bool:
        if not isinstance(value, bool):
            raise ValueError(f"`{field}` (={value!r}) must be true or false. Write one of them.")
    elif expected == Sequence[int] | None:
        _check_indices(field, value)
    else:
        _check_plain(field, value, expected)


def _check_plain(field: str, value: Any, expected: Any) -> None:
    """The options of plug-ins may have plain types."""
    kinds = {int: (int,), float: (int, float), str: (str,)}.get(expected)
    if kinds is None:
        raise ValueError(
            f"`{field}` (={value!r}) must have a type that can be checked: it is annotated as "
            f"{expected}. Use bool, int, float, str, Literal, or Annotated with Bounds."
        )
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"`{field}` (={value!r}) must be of type {expected.__name__}. Change it.")


def _check_number(field: str, value: Any, kind: type, bounds: Bounds) -> None:
    allowed = (int,) if kind is int else (int, float)
    is_number = isinstance(value, allowed) and not isinstance(value, bool)
    if is_number and bounds.low <= value <= bounds.high and math.isfinite(value):
        return
    word = "a whole number" if kind is int else "a number"
    top = f" to {bounds.high:g}" if math.isfinite(bounds.high) else " up"
    raise ValueError(
        f"`{field}` (={value!r}) must be {word} from {bounds.low:g}{top}. Change it, or leave it "
        "out for the default."
    )


def _check_indices(field: str, value: Any) -> None:
    if value is None:
        return
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    if not (is_list and all(type(item) is int for item in value)):
        raise ValueError(
            f"`{field}` (={value!r}) must be a list of class indices: the method uses only images "
            "of these classes. Write for example [0, 1], or leave it out for all."
        )
