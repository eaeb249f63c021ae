"""A run as a user's processes, to be killed: one driver at a time, and what it has started."""

from __future__ import annotations

import collections
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

TARGETS = ("driver", "worker", "probe", "keeper", "raylet")
ENDING = ("driver", "raylet")  # without them the driver is gone; a local Ray has one node
TITLES = {  # of Ray's processes; any other is a worker
    "ray::LatencyProbe": "probe",
    "ray::Keeper": "keeper",
    "ray::IDLE": None,
    "ray::DashboardAgent": "raylet",  # which ends with its agents
    "ray::RuntimeEnvAgent": "raylet",
}
END_S = 60.0  # for processes to go after their driver
POLL_S = 0.1


class Session:
    """One driver process over a run folder: it begins the run, or goes on with it.

    Args:
        config: The config's file.
        folder: The run folder.
    """

    def __init__(self, config: Path, folder: Path) -> None:
        begun = (folder / "config.yaml").exists() and (folder / "baseline.json").exists()
        words = ["resume", folder] if begun else ["run", config, "--out", folder]
        self._log = folder.with_suffix(".log")
        self._known: set[int] = set()
        with self._log.open("ab") as log:
            self._driver = subprocess.Popen(
                [sys.executable, "-m", "prunesearch.search.cli", *map(str, words)],
                stdout=log,
                stderr=log,
                env=os.environ | {"NO_COLOR": "1"},
            )

    @property
    def over(self) -> bool:
        """Whether the run has come to its end.

        Raises:
            RuntimeError: If the driver has ended in another way.
        """
        code = self._driver.poll()
        if code:
            raise RuntimeError(f"the driver ended with {code}:\n{self._last_words()}")
        return code == 0

    def finish(self) -> None:
        """Waits for the end of the run.

        Raises:
            RuntimeError: If the driver ends in another way.
        """
        self._driver.wait()
        assert self.over

    def kill(self, rng: random.Random) -> str:
        """Kills one process; all kinds that are there are equally likely.

        Returns:
            Its kind, of `TARGETS`.
        """
        while True:
            found = self._processes()
            target = rng.choice([name for name in TARGETS if name in found])
            with contextlib.suppress(ProcessLookupError):  # gone meanwhile: another one
                os.kill(rng.choice(found[target]), signal.SIGKILL)
                return target

    def wait_for_the_end(self) -> int:
        """Waits for the driver and all that it has started; ends what stays longer.

        Returns:
            How many processes had to be ended.
        """
        deadline = time.monotonic() + END_S
        while time.monotonic() < deadline and (self._driver.poll() is None or self._left()):
            time.sleep(POLL_S)
        left = self._left()
        for pid in left:
            with self._log.open("a") as log:
                log.write(f"outlived its driver by {END_S:g} s: {_command(pid)}\n")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._driver.poll() is None:
            self._driver.kill()
        self._driver.wait()
        return len(left)

    def _processes(self) -> dict[str, list[int]]:
        """The living processes by kind."""
        found: dict[str, list[int]] = collections.defaultdict(list)
        found["driver"].append(self._driver.pid)
        for pid in _descendants(self._driver.pid, _parents()):
            self._known.add(pid)
            title = _command(pid)
            if title.endswith("/raylet"):
                found["raylet"].append(pid)
            elif title.startswith("ray::"):
                names = [TITLES[start] for start in TITLES if title.startswith(start)]
                if kind := (names[0] if names else "worker"):
                    found[kind].append(pid)
        return found

    def _left(self) -> list[int]:
        """What the driver has started and still lives; orphans have another parent."""
        living = _parents()
        return [pid for pid in self._known if pid in living]

    def _last_words(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])


def _parents() -> dict[int, int]:
    """Parent of each process of this machine; dead ones that nobody waited for are left out."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:  # gone meanwhile
                continue
            if state != "Z":
                found[int(entry.name)] = int(parent)
    return found


def _descendants(pid: int, parents: Mapping[int, int]) -> list[int]:
    children = [child for child, parent in parents.items() if parent == pid]
    return children + [d for child in children for d in _descendants(child, parents)]


def _command(pid: int) -> str:
    """The process's title."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[0]
    except OSError:
        return ""
