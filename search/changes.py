"""What may not change while a run goes on: what its stored trials mean, and its search space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .config import ConfigError, parse_config
from .sensitivity import SENSITIVITY
from .setup import Problem
from .store import BLOCKS, FIXED, read_json, write_json
from .yaml_source import show

MEANING = (
    "model", "task", "data", "baseline", "sparse_training", "recover", "objectives", "constraints",
    "latency", "probes",
)  # fmt: skip
MOVABLE = (  # of the first two what lies there is compared; the others change nothing
    ("data", "root"), ("model", "checkpoint"), ("model", "licence"), ("data", "workers"),
)  # fmt: skip
DERIVED = (BLOCKS, SENSITIVITY)  # made of the space; they are made anew, from the cache


def remember(folder: Path, problem: Problem) -> None:
    """Stores what a new run is."""
    write_json(folder / FIXED, _fixed(problem))


def settle_changes(folder: Path, problem: Problem, *, allow_space_change: bool) -> list[str]:
    """Refuses to go on with a run that would no longer be the same.

    Args:
        folder: The run folder.
        problem: The run as it would go on.
        allow_space_change: Whether another search space is accepted. Trials that do not fit it
            stay in the ledger and on the front; the sampler forgets them.

    Returns:
        The accepted differences of the space, one line each.

    Raises:
        ConfigError: If trials before and after would not be comparable, or the space is another
            one and that is not allowed.
    """
    if not (folder / FIXED).exists():  # of a version that did not store it
        remember(folder, problem)
        return []
    now = _fixed(problem)
    try:
        before = _with_defaults(read_json(folder / FIXED))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"`{folder / FIXED}` must hold what the run began with: {error}. Restore it "
            "from a copy, or delete it: the config of now counts then."
        ) from error
    meaning = list(_differences(before["meaning"], now["meaning"]))
    if meaning:
        raise ConfigError(
            f"`RUN_DIR` (={folder}) must go on as it began: its trials could not be compared with "
            f"new ones. Undo the change, or start a new run:\n{_lines(meaning)}"
        )
    space = list(_differences(before["space"], now["space"]))
    if space and not allow_space_change:
        raise ConfigError(
            f"`RUN_DIR` (={folder}) must keep its search space. Undo the change, start a new run, "
            "or accept it with --allow-space-change (trials that do not fit stay in the ledger, "
            f"and the sampler forgets them):\n{_lines(space)}"
        )
    if space:
        for name in DERIVED:
            (folder / name).unlink(missing_ok=True)
        remember(folder, problem)
    return space


def _fixed(problem: Problem) -> dict[str, Any]:
    sections = problem.config.model_dump(mode="json")
    groups = {group.name: group.num_channels for group in problem.plan.groups}
    return {
        "meaning": _meaning(sections) | {"images": problem.data_digest},
        "space": sections["space"] | {"removable_blocks": list(problem.blocks), "groups": groups},
    }


def _meaning(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that say what a trial means, without what only says where things are."""
    meaning = {name: sections[name] for name in MEANING}
    for section, key in MOVABLE:
        meaning[section] = {k: v for k, v in meaning[section].items() if k != key}
    meaning["probes"] = {
        name: {k: v for k, v in probe.items() if k != "resource"}
        for name, probe in meaning["probes"].items()
    }
    return meaning


def _with_defaults(fixed: Mapping[str, Any]) -> dict[str, Any]:
    """What a version wrote that did not know all of the present keys: they have their defaults."""
    meaning, space = dict(fixed["meaning"]), dict(fixed["space"])
    images = {"images": meaning.pop("images")}
    found = {name: space.pop(name) for name in ("removable_blocks", "groups")}
    sections = parse_config({**meaning, "space": space}).model_dump(mode="json")
    return {"meaning": _meaning(sections) | images, "space": sections["space"] | found}


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """`key.sub: before -> now` of everything that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(before.get(key), now.get(key), inner)
    elif before != now:
        yield f"{name}: {show(before)} -> {show(now)}"


def _lines(differences: list[str]) -> str:
    return "\n".join(f"  {line}" for line in differences)
