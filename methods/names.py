"""Messages about names that a user got wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(
    field: str, value: object, known: Iterable[str], *, what: str = "a known name"
) -> str:
    """Says that `value` is not one of `known`, which names there are, and the nearest one.

    Args:
        field: The key that holds the wrong name; with `what` = an option, its last part is the
            wrong name itself.
        value: What the key holds.
        known: The names that there are.
        what: What `field` must be.
    """
    names = list(known)
    wrong = field.rpartition(".")[2] if what == "an option" else str(value)
    return (
        f"`{field}` (={value}) must be {what}: there are {', '.join(names) or 'none'}. "
        f"{nearest(wrong, names) or 'Use one of these.'}"
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """The sentence that names the most similar of `known`; empty when none is similar."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"Did you mean `{match[0]}`?" if match else ""
