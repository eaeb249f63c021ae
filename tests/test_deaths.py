"""What is read from a dead worker's log and from Ray's words: real logs of real processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prunesearch.search.deaths import (
    TAIL_BYTES,
    Death,
    cause_of_death,
    is_disk_full,
    own_log,
    read_tail,
)

DIED = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"


def log_of(tmp_path: Path, code: str) -> str:
    """Standard error of a process that dies as a worker does."""
    path = tmp_path / "worker.err"
    with path.open("wb") as log:
        subprocess.run([sys.executable, "-c", code], stderr=log, timeout=60, check=False)
    return read_tail(str(path))


@pytest.mark.parametrize(
    ("act", "says"),
    [
        ("ctypes.string_at(0)", "its worker crashed: Segmentation fault (in string_at, __init__"),
        ("os.abort()", "its worker crashed: Aborted (in forward, <string>:3)"),
    ],
)
def test_a_crash_names_its_signal_and_place_and_is_not_tried_again(
    tmp_path: Path, act: str, says: str
) -> None:
    code = f"import ctypes, faulthandler, os\ndef forward():\n  {act}\nfaulthandler.enable(2)\n"
    death = cause_of_death(DIED, log_of(tmp_path, f"{code}forward()"))
    assert death.cause.startswith(says) and not death.again and not death.stop


def test_a_hang_that_holds_the_lock_is_ended_and_says_where(tmp_path: Path) -> None:
    code = (
        "import ctypes\n"
        "from prunesearch.search import watchdog\n"
        "watchdog.TIMEOUT_GRACE_S = 0.1\n"
        "def forward():\n"
        "  mutex = ctypes.create_string_buffer(64)\n"
        "  while True: ctypes.PyDLL(None).pthread_mutex_lock(mutex)\n"
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=[1000], daemon=True).start()\n"
        "with watchdog.watchdog(0.1):\n"
        "  forward()\n"
    )
    death = cause_of_death(DIED, log_of(tmp_path, code), limit_s=0.1)
    assert "`resources.trial_timeout_s` (=0.1) and could not be interrupted" in death.cause
    assert "(in forward, <string>:6)" in death.cause and not death.again


@pytest.mark.parametrize(
    ("error", "again", "says"),
    [
        (DIED, True, "killed"),
        ("The actor died because its node has died. Node Id: 12ab", True, "node was lost"),
        (
            "OutOfMemoryError: Task was killed due to the node running low on memory",
            True,
            "memory",
        ),
        ("raised in its creation task, ray::Worker()\nImportError: no cv2", False, "no cv2"),
        ("something new", True, "something new"),
        ("", True, "no reason given"),
    ],
)
def test_what_comes_from_outside_is_tried_again(error: str, again: bool, says: str) -> None:
    death = cause_of_death(error, log="a warning of an earlier trial")
    assert death.again is again and says in death.cause and not death.stop


def test_a_full_disk_is_nobodys_fault() -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert is_disk_full(error) and not is_disk_full(ValueError("full of errors"))
    death = cause_of_death(f"ray::Worker.train()\n{error}", log="")
    assert death == Death(f"the disk of the run folder is full: {error}", again=True, stop=True)


def test_a_log_is_read_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * TAIL_BYTES + "Fehler ä".encode())
    assert len(read_tail(str(path)).encode()) == TAIL_BYTES and read_tail(str(path)).endswith("ä")
    assert read_tail(str(tmp_path / "none")) == "" == read_tail("")


def test_a_process_knows_the_file_that_its_errors_go_to(tmp_path: Path) -> None:
    code = "import sys\nfrom prunesearch.search.deaths import own_log\nsys.stderr.write(own_log())"
    assert log_of(tmp_path, code) == str(tmp_path / "worker.err")
    assert own_log() == "" or Path(own_log()).is_file()
