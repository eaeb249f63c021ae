"""What there is: methods, models, data sets, and the state of this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import typer

from .cli_common import EXIT_FAILED, AsJson, complain, out


def methods(as_json: AsJson = False) -> None:
    """List criteria, selection rules, block orders, samplers and tasks."""
    from .tables import known_methods, names_table

    _print_names(known_methods(), names_table, as_json)


def models(as_json: AsJson = False) -> None:
    """List the model zoo and the ways to name other models."""
    from .tables import known_models, names_table

    _print_names(known_models(), names_table, as_json)


def datasets(as_json: AsJson = False) -> None:
    """List the data sets and where their files are looked for."""
    from .tables import known_datasets, names_table

    _print_names(known_datasets(), names_table, as_json)


def doctor(as_json: AsJson = False) -> None:
    """Check this machine: versions, hardware, memory, and that a local Ray starts."""
    from .doctor import diagnose

    checks = diagnose()
    if as_json:
        out.print_json(json.dumps(checks))
    else:
        for item in checks:
            mark = "ok  " if item["ok"] else "FAIL"
            out.print(f"{mark}  {item['check']}: {item['found']}", markup=False, soft_wrap=True)
    if not all(item["ok"] for item in checks):
        raise typer.Exit(EXIT_FAILED)


def schema() -> None:
    """Print the JSON Schema of a config, for editors: completion, and mistakes while one types."""
    from .config_schema import config_schema

    out.print_json(json.dumps(config_schema()))


def _print_names(
    names: dict[str, dict[str, str]], table: Callable[..., Any], as_json: bool
) -> None:
    from .tables import plugin_troubles

    for text in plugin_troubles():
        complain(text)
    out.print_json(json.dumps(names)) if as_json else out.print(table(names))
