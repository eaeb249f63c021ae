"""The methods by name, and the process that runs one of them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...yaml_source import ConfigError


@dataclass(frozen=True)
class Method:
    """How a method is run.

    Attributes:
        module: Module of this package that has its `run`.
        label: What tables call it.
        shared: Whether one process a worker is started, which share the work.
        ends: Whether it ends by itself; the others are stopped when the time is over.
        package: What has to be installed, if anything is.
    """

    module: str
    label: str
    shared: bool = False
    ends: bool = False
    package: str | None = None


OURS = "ours"
METHODS: dict[str, Method] = {
    OURS: Method("ours", "this search", ends=True),
    "torch-pruning": Method("torch_pruning", "Torch-Pruning", shared=True),
    "fastnas": Method("fastnas", "ModelOpt FastNAS", package="modelopt"),
    "moasha": Method("moasha", "Syne Tune MOASHA", package="syne_tune"),
}


def check_methods(names: Sequence[str]) -> None:
    """Refuses unknown methods and those whose library is not installed.

    Raises:
        ConfigError: Which names the fix.
    """
    from ....methods.names import unknown_name

    for name in names:
        if name not in METHODS:
            raise ConfigError(unknown_name("--methods", name, METHODS))
        package = METHODS[name].package
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"`--methods` (={name}) must be installed: there is no {package}. Install it with "
                "`pip install 'prune-search[peers]'`, or leave the method out."
            )


def command(
    name: str, problem: Path, folder: Path, *, started: float, seconds: float, worker: int
) -> list[str]:
    """The command line of a method's process."""
    values = [name, str(problem), str(folder), repr(started), repr(seconds), str(worker)]
    return [sys.executable, "-m", __spec__.name, *values]


def main(arguments: Sequence[str]) -> None:
    """Runs a method in this process: the other end of `command`."""
    from .log import Log
    from .problem import PeerProblem

    name, problem_folder, folder, started, seconds, worker = arguments
    method = METHODS[name]
    problem = PeerProblem(Path(problem_folder))
    options: dict[str, Any] = {}
    if method.shared:
        options |= {"worker": int(worker), "workers": problem.workers}
    if method.ends:
        options["seconds"] = float(seconds)
    run: Callable[..., None] = importlib.import_module(f".{method.module}", __package__).run
    run(problem, Log(Path(folder), problem, float(started)), **options)


if __name__ == "__main__":
    main(sys.argv[1:])
