"""`prune-search cache`: what runs on this machine share."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .cli_common import AsJson, out


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what runs share on this machine; each run keeps what it used itself."""
    from .shelf import RESULTS, Shelf, cache_dir

    shelf = Shelf(cache_dir() / RESULTS)
    if clear:
        shelf.clear()
    kinds = {kind: {"entries": n, "bytes": size} for kind, (n, size) in shelf.usage().items()}
    if as_json:
        out.print_json(json.dumps({"folder": str(shelf.folder), "kinds": kinds}))
        return
    out.print(str(shelf.folder), markup=False, highlight=False, soft_wrap=True)
    for kind, found in kinds.items():
        out.print(f"{found['entries']:>8} {kind:<10} {found['bytes'] / 2**20:>10.1f} MiB")
    out.print(f"{sum(found['bytes'] for found in kinds.values()) / 2**30:.2f} GiB in all")
