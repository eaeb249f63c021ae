"""What the command groups share: consoles, common arguments, loading a config."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .yaml_source import ConfigError, printable

if TYPE_CHECKING:
    from .config import SearchConfig

EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 1, 2, 130

PLAIN: dict[str, Any] = {"markup": False, "emoji": False}  # texts of others may hold brackets
out = Console(**PLAIN)
err = Console(stderr=True, **PLAIN)


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The search's config.")]
RunDir = Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run folder, or its URI.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="key.sub=value", help="Override a config key; repeatable."),
]
Address = Annotated[
    str | None,
    typer.Option(help="The Ray cluster of this node: auto or HOST:PORT; local by default."),
]
SpaceChange = Annotated[
    bool,
    typer.Option("--allow-space-change", help="Go on although the search space is another one."),
]
JobServer = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="http://HEAD:8265",
        help="The cluster that the run was submitted to; the run is then named, not its folder.",
    ),
]
Results = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="The folder of runs on the cluster's head; ~/prune-search-results by default.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Trials = Annotated[int | None, typer.Option(min=1, help="How many trials in all.")]


def load(path: Path, overrides: Sequence[str]) -> SearchConfig:
    """The checked config; `--set` values on top."""
    from .config import check_names, load_config

    config = load_config(path, overrides)
    import_user_code(config)
    check_names(config, path, overrides)
    return config


def checked(work: Callable[[], Any]) -> Any:
    """The result of `work`; what it refuses is the user's mistake."""
    try:
        return work()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def import_user_code(config: SearchConfig) -> None:
    """`module:callable` is looked for in the current folder too, last; Ray's workers follow."""
    if config.user_code and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def print_wide(table: Any) -> None:
    """Prints a table in full width where the output is not a terminal."""
    if out.is_terminal:
        out.print(table)
    else:
        Console(width=160, file=out.file, **PLAIN).print(table)


def complain(message: str) -> None:
    """One message on standard error."""
    err.print(f"prune-search: {printable(message)}", markup=False, highlight=False, soft_wrap=True)
