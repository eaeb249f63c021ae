"""Models, data sets, tasks and criteria of other distributions, found by their entry points.

A distribution names them in its pyproject.toml:

    [project.entry-points."prunesearch.models"]
    my_net = "my_package.models:my_net"

Only the names are read until one of them is asked for; then its module is imported. So installing
a plug-in is trusting it, as with every other package.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

Kind = Literal["models", "datasets", "tasks", "criteria"]
_FIELDS = {
    "models": "model.name",
    "datasets": "data.name",
    "tasks": "task",
    "criteria": "space.criteria",
}


@dataclass(frozen=True)
class Plugin:
    """One entry point.

    Attributes:
        kind: Models, datasets, tasks or criteria.
        name: What a config calls it.
        value: `package.module:attribute`.
        distribution: Name and version of the distribution that offers it.
    """

    kind: Kind
    name: str
    value: str
    distribution: str
    _entry: EntryPoint

    def load(self) -> Any:
        """What the entry point names; imports its module.

        Raises:
            ValueError: If that fails; the message names the distribution.
        """
        try:
            return self._entry.load()
        except (Exception, SystemExit) as error:  # whatever a foreign module raises
            raise ValueError(
                f"`{_FIELDS[self.kind]}` (={self.name}) must be a plug-in that can be loaded: "
                f"{self.value} of {self.distribution} stopped with {type(error).__name__}: "
                f"{error}. Update {self.distribution.split()[0]}, or uninstall it."
            ) from error


def plugins(kind: Kind, taken: Collection[str]) -> dict[str, Plugin]:
    """The plug-ins of a kind by name, without those whose names clash.

    Args:
        kind: Which entry points.
        taken: Names that are this project's own.
    """
    return {
        name: found[0]
        for name, found in _by_name(kind).items()
        if name not in taken and len(found) == 1
    }


def clashes(kind: Kind, taken: Collection[str]) -> list[str]:
    """One sentence for every name that is refused because somebody else has it."""
    said = []
    for name, found in _by_name(kind).items():
        who = " and ".join(plugin.distribution for plugin in found)
        field = _FIELDS[kind]
        if name in taken:
            said.append(
                f"`{field}` (={name}) stays prune-search's own: the plug-in of that name, of "
                f"{who}, is not used. Rename its entry point."
            )
        elif len(found) > 1:
            said.append(
                f"`{field}` (={name}) must be one thing: {who} both offer it, and neither is "
                "used. Uninstall one of them."
            )
    return said


def listed(kind: Kind, taken: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """The plug-ins with a line each, and what is wrong with them, a sentence each.

    Loads them: a broken one is named among the sentences, and in its own line.
    """
    lines, said = {}, clashes(kind, taken)
    for name, plugin in plugins(kind, taken).items():
        try:
            found = plugin.load()
            text = getattr(found, "description", None) or inspect.getdoc(found) or plugin.value
            lines[name] = f"{text.splitlines()[0]} Plug-in of {plugin.distribution}."
        except ValueError as error:
            lines[name] = f"cannot be loaded. Plug-in of {plugin.distribution}."
            said.append(str(error))
    return lines, said


def _by_name(kind: Kind) -> dict[str, list[Plugin]]:
    names: dict[str, list[Plugin]] = {}
    for plugin in _found(kind):
        names.setdefault(plugin.name, []).append(plugin)
    return names


@cache
def _found(kind: Kind) -> tuple[Plugin, ...]:
    """Every entry point of a kind, by name; read once a process."""
    found = []
    for entry in entry_points(group=f"prunesearch.{kind}"):
        dist = entry.dist
        who = f"{dist.name} {dist.version}" if dist is not None else "an unknown distribution"
        found.append(Plugin(kind, entry.name, entry.value, who, entry))
    return tuple(sorted(found, key=lambda plugin: (plugin.name, plugin.distribution)))
