"""Ray's token: private from the first moment; a local Ray asks for it, on the loopback only."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from prunesearch.search import auth
from prunesearch.search.auth import (
    MODE,
    TOKEN,
    TOKEN_PATH,
    prepare_token,
    private_folder,
    wants_token,
)
from prunesearch.search.config import ConfigError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (MODE, TOKEN, TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_token_is_private_and_stays(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = os.umask(0)
    try:
        prepare_token()
    finally:
        os.umask(before)
    path = home / ".ray" / "auth_token"
    token = path.read_text()
    assert mode(path) == 0o600 and mode(path.parent) == 0o700
    assert len(token) == 64 and int(token, 16)
    prepare_token()
    assert path.read_text() == token and [p.name for p in path.parent.iterdir()] == [path.name]
    assert capsys.readouterr().err == ""


def test_a_token_that_others_could_read_is_tightened(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("secret")
    path.chmod(0o644)
    prepare_token()
    assert mode(path) == 0o600 and path.read_text() == "secret"
    said = capsys.readouterr().err
    assert "mode 0644" in said and "secret" not in said


def test_two_processes_that_start_at_once_have_one_token(home: Path) -> None:
    found: list[str] = []
    gate = threading.Barrier(8)

    def start() -> None:
        gate.wait()
        prepare_token()
        found.append((home / ".ray" / "auth_token").read_text())

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1 and len(found[0]) == 64


def test_the_users_own_choice_is_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = home / "chosen"
    chosen.write_text("secret")
    chosen.chmod(0o644)
    for name, value in ((TOKEN, "secret"), (TOKEN_PATH, str(chosen)), (MODE, "disabled")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            prepare_token()
            assert wants_token() == (name != MODE)
    assert not (home / ".ray").exists() and mode(chosen) == 0o644
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "chmod 600" in said and "secret" not in said


def test_a_place_that_cannot_be_written_is_named(home: Path) -> None:
    (home / ".ray").write_text("a file")
    with pytest.raises(ConfigError, match=rf"auth_token` must be .*{TOKEN_PATH}"):
        prepare_token()


def test_rays_files_are_where_nobody_else_can_enter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    folder = private_folder().parent
    assert (
        folder.parent == tmp_path and mode(folder) == 0o700 and private_folder().parent == folder
    )
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="nobody else can enter.*RAY_TMPDIR"):
        private_folder()
    folder.rmdir()
    (tmp_path / "of-another").mkdir(mode=0o700)
    folder.symlink_to("of-another")
    with pytest.raises(ConfigError, match="nobody else can enter"):
        private_folder()


# --- a real local Ray ------------------------------------------------------------------------

LOCAL = """
import json, os, pathlib, sys
import grpc, ray
from prunesearch.search.auth import answers_anyone
from prunesearch.search.cluster import connect
from prunesearch.search.doctor import diagnose

def listening():
    "Addresses on which processes of this session listen, as the kernel lists them."
    inodes = set()
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == os.getsid(0):
                for handle in (process / "fd").iterdir():
                    inodes.add(os.readlink(handle).removeprefix("socket:[").removesuffix("]"))
        except OSError:
            pass
    for name in ("tcp", "tcp6"):
        for line in pathlib.Path("/proc/net/" + name).read_text().splitlines()[1:]:
            _, local, _, state, *others = line.split()
            if state == "0A" and others[5] in inodes:
                yield local.rpartition(":")[0]

with connect(None):
    head = ray.get_runtime_context().gcs_address
    facts = {
        "head": head,
        "open": answers_anyone(head),
        "listening": sorted(set(listening())),
        "works": ray.get(ray.remote(lambda: 1).options(num_cpus=0).remote()),
        "session": ray._private.worker._global_node.get_session_dir_path(),
    }
    if sys.argv[1:] == ["stay"]:
        print(json.dumps(facts), flush=True)
        sys.stdin.read()
if sys.argv[1:] != ["stay"]:
    facts["doctor"] = diagnose()
    print(json.dumps(facts))
"""

JOIN = """
import sys
import ray
from prunesearch.search.cluster import connect

with connect(sys.argv[1]):
    print(ray.get(ray.remote(lambda: 2).options(num_cpus=0).remote()))
"""


def environment(home: Path, **changes: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in (MODE, TOKEN, TOKEN_PATH)}
    return clean | {"HOME": str(home), "PRUNE_SEARCH_CACHE": str(home / "cache")} | changes


def test_a_local_ray_asks_for_the_token_on_the_loopback_and_nothing_tells_it(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOCAL],
        capture_output=True, text=True, env=environment(tmp_path), timeout=300, check=False,
        start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["works"] == 1 and not facts["open"]
    assert all(item["ok"] for item in facts["doctor"]), facts["doctor"]
    path = tmp_path / ".ray" / "auth_token"
    token = path.read_text()
    assert mode(path) == 0o600
    assert facts["listening"] and all(map(_is_loopback, facts["listening"])), facts["listening"]
    assert token not in done.stdout + done.stderr
    session = Path(facts["session"])
    assert any(mode(folder) == 0o700 for folder in session.parents)
    assert _files_with(token, session) == []


def test_a_cluster_that_needs_no_token_is_warned_of(tmp_path: Path) -> None:
    """By a Ray without tokens, which RAY_AUTH_MODE=disabled asks for."""
    with subprocess.Popen(
        [sys.executable, "-c", LOCAL, "stay"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(tmp_path, **{MODE: "disabled"}, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0"),
        start_new_session=True,
    ) as ray:  # fmt: skip
        assert ray.stdout is not None
        facts: dict[str, Any] = json.loads(ray.stdout.readline())
        joined = subprocess.run(
            [sys.executable, "-c", JOIN, facts["head"]],
            capture_output=True, text=True, timeout=120, check=False,
            env=environment(tmp_path, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0"),
        )  # fmt: skip
        _, said = ray.communicate("")
    assert facts["open"] and not (tmp_path / ".ray").exists()
    assert joined.stdout.strip() == "2", joined.stderr
    for text in (said, joined.stderr):
        assert text.count("answers without a token") == 1 and "RAY_AUTH_MODE=token" in text


def test_what_cannot_be_asked_counts_as_closed() -> None:
    assert not auth.answers_anyone("127.0.0.1:1")


def _is_loopback(address: str) -> bool:
    """An address as /proc/net/tcp and tcp6 have it: 32-bit words in the machine's order."""
    return address in ("0100007F", "0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F")


def _files_with(text: str, folder: Path) -> list[Path]:
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and text.encode() in path.read_bytes()
    ]
