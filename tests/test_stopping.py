"""`stop`: the process that has a run folder's lock is asked to end, and no other."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prunesearch.search import ConfigError
from prunesearch.search.locks import LOCK, Owner, locked
from prunesearch.search.stopping import stop

DRIVER = """
import sys, time
from pathlib import Path
from prunesearch.search.interrupt import stopping_gently
from prunesearch.search.locks import locked
asked = []
with locked(Path(sys.argv[1]), print), stopping_gently(asked.append):
    print("driving", flush=True)
    while not asked:
        time.sleep(0.01)
    print(asked[0], flush=True)
"""


def drive(folder: Path) -> subprocess.Popen[str]:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None and driver.stdout.readline() == "driving\n"
    return driver


def test_stop_asks_the_driver_as_ctrl_c_does(tmp_path: Path) -> None:
    driver = drive(tmp_path)
    assert stop(tmp_path, "my-run").pid == driver.pid
    said, _ = driver.communicate(timeout=60)
    assert "running trials end first" in said and driver.returncode == 0
    with pytest.raises(ConfigError, match="=my-run.*no process of this machine drives it"):
        stop(tmp_path, "my-run")


def test_a_signature_without_a_lock_is_left_alone(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    signed = dataclasses.replace(Owner.here(), pid=bystander.pid)
    (tmp_path / LOCK).write_bytes(signed.signature)
    with pytest.raises(ConfigError, match="no process of this machine drives it"):
        stop(tmp_path, "my-run")
    bystander.communicate(b"\n", timeout=60)
    assert bystander.returncode == 0


def test_a_killed_driver_is_not_asked(tmp_path: Path) -> None:
    driver = drive(tmp_path)
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=60)
    with pytest.raises(ConfigError, match="no process of this machine drives it"):
        stop(tmp_path, "my-run")


def test_a_driver_on_another_machine_is_named(tmp_path: Path) -> None:
    with locked(tmp_path, pytest.fail):
        signed = dataclasses.replace(Owner.here(), pid=1, host="node7")
        (tmp_path / LOCK).write_bytes(signed.signature)
        with pytest.raises(ConfigError, match="process 1 on node7"):
            stop(tmp_path, "my-run")
        (tmp_path / LOCK).write_bytes(b"")  # ours again, for the end of the lock
