"""One driver a run folder, whatever becomes of the others."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from prunesearch.search import ConfigError, locks
from prunesearch.search.locks import LOCK, Claim, FileSign, Owner, StorageError, claimed, locked

HOLD = """\
import sys, time
from pathlib import Path
from prunesearch.search.locks import locked
with locked(Path(sys.argv[1]), print):
    print("locked", flush=True)
    time.sleep(600)
"""
ELSEWHERE = Owner(4711, "another-machine", "2026-01-01T00:00:00+00:00")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "POLL_S", 0.01)
    monkeypatch.setattr(locks, "BEAT_S", 0.01)


def hold(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def sign_elsewhere(folder: Path, *, silent_s: float) -> Path:
    """The lock of a driver on a machine whose file locks are not seen here."""
    path = folder / LOCK
    path.write_bytes(ELSEWHERE.signature)
    time = path.stat().st_mtime - silent_s
    os.utime(path, (time, time))
    return path


def test_a_live_driver_is_named_and_a_killed_one_is_followed_at_once(tmp_path: Path) -> None:
    process = hold(tmp_path)
    owner = json.loads((tmp_path / LOCK).read_text())
    assert owner.keys() == {"pid", "host", "since"}
    assert (owner["pid"], owner["host"]) == (process.pid, socket.gethostname())
    said: list[str] = []
    with pytest.raises(ConfigError, match=f"another process .*process {process.pid} on"):
        with locked(tmp_path, said.append):
            pytest.fail("two drivers")
    assert json.loads((tmp_path / LOCK).read_text()) == owner and not said
    process.kill()
    process.communicate()
    with locked(tmp_path, said.append):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert len(said) == 1 and f"process {process.pid}" in said[0] and "taken over" in said[0]


def test_a_driver_that_ended_in_order_leaves_nothing_to_say(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path, pytest.fail):
            assert locks.in_use(tmp_path)
        assert not locks.in_use(tmp_path)
    with pytest.raises(KeyError), locked(tmp_path, pytest.fail):
        raise KeyError
    with locked(tmp_path, pytest.fail):
        pass


@pytest.mark.parametrize(
    "text", ["", "no JSON", "[]", '{"pid": 1}', '{"pid": -1, "host": "a", "since": "b"}']
)
def test_a_lock_without_a_signature_is_free(text: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(text)
    with locked(tmp_path, pytest.fail):
        pass


def test_a_driver_on_another_machine_is_taken_for_dead_when_it_is_silent(tmp_path: Path) -> None:
    sign_elsewhere(tmp_path, silent_s=locks.SILENT_S + 1)
    said: list[str] = []
    with locked(tmp_path, said.append):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert len(said) == 1 and "another-machine" in said[0] and "taken over" in said[0]


def test_a_driver_on_another_machine_that_gives_a_sign_of_life_is_left_alone(
    tmp_path: Path,
) -> None:
    path = sign_elsewhere(tmp_path, silent_s=20)
    said: list[str] = []

    def beat(line: str) -> None:
        said.append(line)
        os.utime(path)

    with pytest.raises(ConfigError, match="process 4711 on another-machine"):
        with locked(tmp_path, beat):
            pytest.fail("two drivers")
    assert len(said) == 1 and "waiting" in said[0]
    assert path.read_bytes() == ELSEWHERE.signature


def test_a_number_that_another_process_has_by_now_is_no_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 10.0)
    path = tmp_path / LOCK
    path.write_bytes(Owner(os.getpid(), socket.gethostname(), "2026-01-01").signature)
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
        with claimed(FileSign(path), "place", pytest.fail):
            pytest.fail("two drivers")
    time = path.stat().st_mtime - locks.SILENT_S - 1
    os.utime(path, (time, time))
    said: list[str] = []
    with claimed(FileSign(path), "place", said.append):
        assert len(said) == 1 and "taken over" in said[0]


def test_silence_is_measured_by_the_clock_of_the_files(tmp_path: Path) -> None:
    path = sign_elsewhere(tmp_path, silent_s=500)
    assert FileSign(path).silent_s() >= 500
    FileSign(path).renew(b"")
    assert FileSign(path).silent_s() < 500


def test_who_loses_the_run_stops_and_says_why(tmp_path: Path) -> None:
    """As after a machine that slept for longer than the silence that is allowed."""
    told = threading.Event()
    reasons: list[str] = []

    def stop(reason: str) -> None:
        reasons.append(reason)
        told.set()

    with pytest.raises(StorageError, match="another-machine"):
        with locked(tmp_path, pytest.fail) as claim:
            claim.then(stop)
            (tmp_path / LOCK).write_bytes(ELSEWHERE.signature)
            assert told.wait(60)
            with pytest.raises(StorageError, match="taken it over"):
                claim.check()
    assert "taken it over" in reasons[0]
    assert (tmp_path / LOCK).read_bytes() == ELSEWHERE.signature  # the other's


def test_of_two_that_sign_at_the_same_moment_the_last_one_has_it(tmp_path: Path) -> None:
    class Race(FileSign):
        """Another machine signs just after this one."""

        def write(self, data: bytes) -> None:
            super().write(data)
            super().write(ELSEWHERE.signature)

    with pytest.raises(ConfigError, match="another-machine"):
        with claimed(Race(tmp_path / LOCK), "place", pytest.fail, settle_s=0.01):
            pytest.fail("two drivers")


def test_signs_of_life_go_on_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    beats = threading.Semaphore(0)

    class Watched(FileSign):
        def renew(self, data: bytes) -> None:
            assert data == path.read_bytes()
            super().renew(data)
            beats.release()

    with claimed(Watched(path), "place", pytest.fail) as claim:
        for _ in range(3):
            assert beats.acquire(timeout=60)
        assert isinstance(claim, Claim) and claim.lost is None
    assert path.read_bytes() == b""
