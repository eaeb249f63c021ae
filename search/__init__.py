"""The search: config, space, sampler, driver, store, front, export and command line.

    from prunesearch.search import run, load_pruned

Names are imported when they are first used, so that `load_pruned` needs neither Ray nor Optuna.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..methods.exported import load_pruned
    from .config import ConfigError, SearchConfig, load_config, parse_config
    from .runs import Run, resume, run

__all__ = [
    "ConfigError",
    "Run",
    "SearchConfig",
    "load_config",
    "load_pruned",
    "parse_config",
    "resume",
    "run",
]

_HOMES = {
    "ConfigError": "config",
    "Run": "runs",
    "SearchConfig": "config",
    "load_config": "config",
    "load_pruned": ".methods.exported",
    "parse_config": "config",
    "resume": "runs",
    "run": "runs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
