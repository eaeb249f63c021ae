"""A process that has imported everything, and forks for each command: imports take ten seconds.

Started as a script, it reads one JSON line per command from stdin and answers with one.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn


class Zygote:
    """Runs the command line in processes of their own that need not import anything."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"NO_COLOR": "1"},
        )
        atexit.register(self._end)

    def run(
        self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout_s: float
    ) -> tuple[int, str, str]:
        """One command: exit code, stdout and stderr; it is killed if it takes longer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        asked = {"arguments": list(arguments), "cwd": str(cwd), "env": dict(env)}
        stdin.write(json.dumps(asked) + "\n")
        stdin.flush()
        pid = json.loads(stdout.readline())
        killer = threading.Timer(timeout_s, os.kill, (pid, signal.SIGKILL))
        killer.start()
        answer = json.loads(stdout.readline())
        killer.cancel()
        return answer["code"], answer["out"], answer["err"]

    def _end(self) -> None:
        self._process.terminate()
        self._process.wait()


def _serve() -> None:
    # The cluster first: it tells Ray a few things, and Ray looks when it is imported.
    from prunesearch.search import cli, cluster, driver, runs, setup, tables  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        places = [os.memfd_create(name) for name in ("out", "err")]
        pid = os.fork()
        if pid == 0:
            _become(asked, places, cli.main)
        print(pid, file=answers, flush=True)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = [Path(f"/proc/self/fd/{place}").read_text(errors="replace") for place in places]
        for place in places:
            os.close(place)
        print(
            json.dumps({"code": code, "out": texts[0], "err": texts[1]}), file=answers, flush=True
        )


def _become(asked: Mapping[str, Any], places: Sequence[int], main: Callable[[], None]) -> NoReturn:
    """Runs the command line as a process that was started for it."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(places[0], 1)
    os.dup2(places[1], 2)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.argv = ["prune-search", *asked["arguments"]]
    main()
    sys.exit()


if __name__ == "__main__":
    _serve()
