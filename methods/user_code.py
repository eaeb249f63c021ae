"""Finds the callable that a config names as `module:callable`. This runs the user's module."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from .names import unknown_name

LIBRARIES = ("torchvision", "timm")  # `timm:NAME` is a model's name, and no module of others


def names_code(name: str) -> bool:
    """Whether a name is `package.module:callable`: what it means is imported and called."""
    source, colon, _ = name.partition(":")
    return bool(colon) and source not in LIBRARIES


def import_callable(name: str, field: str, what: str, *, sources: str = "") -> Callable[..., Any]:
    """The callable `name`, its module imported.

    Args:
        name: `package.module:callable`.
        field: The config key that holds it, for messages.
        what: What it makes, in a word: model, task.
        sources: Further words on what else may stand there.

    Raises:
        ValueError: If there is no such module or callable, the module fails, or it is one of
            Python's standard library, of which nothing makes a `what`.
    """
    module_name, _, attribute = name.partition(":")
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(
            f"`{field}` (={name}) must name a module of yours or of a library of {what}s: "
            "nothing in Python's standard library builds one. Correct it."
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _broken_module(name, field, error) from error
        raise ValueError(
            f"`{field}` (={name}) must name an importable module: there is no module "
            f"{error.name}. Install it or add its folder to PYTHONPATH{sources}."
        ) from error
    except (Exception, SystemExit) as error:  # whatever a foreign module raises
        raise _broken_module(name, field, error) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        public = [key for key, value in vars(module).items() if callable(value)]
        raise ValueError(unknown_name(field, name, [f"{module_name}:{k}" for k in public]))
    return found  # type: ignore[no-any-return]


def _broken_module(name: str, field: str, error: BaseException) -> ValueError:
    """The user's module exists, and its own code fails when it is imported."""
    return ValueError(
        f"`{field}` (={name}) must name a module that can be imported: it stopped with "
        f"{type(error).__name__}: {error}. Correct the module."
    )
