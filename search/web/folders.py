"""Names from outside become folders inside the results folder, or nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ..runs import CONFIG
from .problems import ProblemError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
READ = (
    CONFIG, ".lock", "baseline.json", "environment.json", "times.json", "front.parquet", "trials",
    "recipes", "weights", "rungs", "blocks.json", "fixed.json",
)  # fmt: skip
"""What the service, or a command that it starts, reads or writes in a run folder."""


def run_folder(results: Path, name: str) -> Path:
    """The folder of a run.

    Raises:
        ProblemError: If there is none, or it leads out of the results folder.
    """
    folder = results / name
    if NAME.fullmatch(name) is None or not _is_run(folder):
        raise ProblemError(
            404,
            f"`run` (={name}) must be a run of this folder: there is none of that name. "
            "/api/v1/runs lists them.",
        )
    links = [part for part in READ if (folder / part).is_symlink()]
    if folder.is_symlink() or links:
        raise ProblemError(
            403,
            f"`run` (={name}) must lie in the results folder: {links[0] if links else name} is a "
            "link. Replace it by what it leads to.",
        )
    return folder


def run_folders(results: Path) -> Iterator[Path]:
    """The folders that `run_folder` gives, by name."""
    for path in sorted(results.glob(f"*/{CONFIG}")):
        try:
            yield run_folder(results, path.parent.name)
        except ProblemError:
            continue  # no name of a run, or a link


def _is_run(folder: Path) -> bool:
    return folder.is_dir() and (folder / CONFIG).is_file()
