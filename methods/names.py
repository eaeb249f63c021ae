"""Messages about names that a user got wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(field: str, name: object, known: Iterable[str]) -> str:
    """Says that `name` is not one of `known`, which names there are, and the nearest one."""
    names = list(known)
    match = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"Did you mean `{match[0]}`?" if match else "Use one of these."
    return (
        f"`{field}` (={name}) must be a known name: there are {', '.join(names) or 'none'}. {hint}"
    )
