"""A folder of results: whole or absent whoever dies, right for many processes, bounded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prunesearch.search import shelf as module
from prunesearch.search.shelf import ENTRY, TENSORS, Packed, Shelf, address

KEY = {"kind": "sparse", "lambda": 0.01}
NAME = address(KEY)
PACKED = Packed.of(KEY, {"accuracy": 0.5}, b"tensors")


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "shelf")


def key(number: int) -> dict[str, object]:
    return KEY | {"number": number}


def start(shelf: Shelf, script: str) -> subprocess.Popen[str]:
    """A process with `shelf`, `Packed`, `address` and `KEY` in scope, without torch: quick."""
    head = (
        "import json, sys, os, time, types\n"
        "from pathlib import Path\n"
        "from prunesearch.search.shelf import Packed, Shelf, address\n"
        f"KEY = {KEY!r}\nshelf = Shelf(Path({str(shelf.folder)!r}))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_what_was_put_comes_back_and_what_was_not_does_not(shelf: Shelf) -> None:
    assert shelf.get(NAME) is None and not shelf.folder.exists()
    shelf.put(NAME, PACKED)
    assert shelf.get(NAME) == PACKED and PACKED.info == {"accuracy": 0.5}
    assert shelf.get(address(key(1))) is None
    bare = Packed.of(key(2), {"ms": 1.0}, b"")
    shelf.put(address(key(2)), bare)
    assert shelf.get(address(key(2))) == bare
    assert not (shelf.folder / address(key(2)) / TENSORS).exists()


def test_the_address_depends_on_everything_in_the_key_and_on_nothing_else() -> None:
    assert address(KEY) == address(dict(reversed(KEY.items())))
    assert address(KEY) != address(key(1))
    assert address(KEY).startswith("sparse-")


def test_keys_that_json_writes_otherwise_come_back_whole(shelf: Shelf) -> None:
    odd = KEY | {"layers": ("a", "b"), "steps": {2: 0.1, 10: 0.2}}
    shelf.put(address(odd), Packed.of(odd, {"path": (1, 2)}, b""))
    found = shelf.get(address(odd))
    assert found is not None and found.info == {"path": [1, 2]}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _other_info(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"info": {"accuracy": 0.9}}))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (ENTRY, _cut),
        (ENTRY, _flip),
        (ENTRY, _other_info),
        (ENTRY, lambda path: path.write_text("[]")),
        (ENTRY, Path.unlink),
        (TENSORS, _cut),
        (TENSORS, _flip),
        (TENSORS, Path.unlink),
    ],
)
def test_a_damaged_entry_counts_for_none_and_is_made_again(
    shelf: Shelf, file: str, damage: Callable[[Path], object]
) -> None:
    shelf.put(NAME, PACKED)
    damage(shelf.folder / NAME / file)
    assert shelf.get(NAME) is None
    shelf.put(NAME, PACKED)
    assert shelf.get(NAME) == PACKED


def test_an_entry_of_another_name_or_a_foreign_file_counts_for_none(shelf: Shelf) -> None:
    other = Packed.of(key(1), {}, b"")
    shelf.put(NAME, other)  # as if it had been renamed
    assert shelf.get(NAME) is None
    (shelf.folder / NAME).write_text("a file")
    shelf.put(NAME, PACKED)
    assert shelf.get(NAME) == PACKED


def test_the_first_of_two_writers_wins(shelf: Shelf) -> None:
    again = Packed.of(KEY, {"accuracy": 0.6}, b"other")
    shelf.put(NAME, PACKED)
    shelf.put(NAME, again)
    assert shelf.get(NAME) == PACKED
    assert not list((shelf.folder / ".aside").iterdir())


def test_another_shelf_takes_an_entry_over_without_a_copy(shelf: Shelf, tmp_path: Path) -> None:
    other = Shelf(tmp_path / "other")
    shelf.put(NAME, PACKED)
    other.link(NAME, shelf)
    shelf.clear()
    assert other.get(NAME) == PACKED
    with pytest.raises(FileNotFoundError):
        shelf.link(address(key(1)), other)
    assert not list((shelf.folder / ".aside").iterdir())


# --- many processes --------------------------------------------------------------------------


def test_readers_see_whole_entries_while_others_write_and_throw_away(shelf: Shelf) -> None:
    """Two writers with unlike bytes for one name, one that clears, one that reads."""
    write = (
        "for n in range(150):\n"
        "    shelf.put(address(KEY), Packed.of(KEY, {'n': n}, os.urandom(50_000)))\n"
    )
    others = [start(shelf, write), start(shelf, write)]
    others.append(start(shelf, "for n in range(150):\n    shelf.clear(); time.sleep(0.002)\n"))
    seen = 0
    while any(process.poll() is None for process in others):
        packed = shelf.get(NAME)
        assert packed is None or packed.is_whole(NAME)
        seen += packed is not None
    assert [process.wait() for process in others] == [0, 0, 0]
    for process in others:
        process.communicate()
    assert seen > 0


@pytest.mark.parametrize("delay_s", [0.0, 0.003, 0.01, 0.02])
def test_a_writer_that_is_killed_leaves_whole_entries_or_none(
    shelf: Shelf, delay_s: float
) -> None:
    script = (
        "print('go', flush=True)\n"
        "for n in range(10**6):\n"
        "    key = KEY | {'number': n}\n"
        "    shelf.put(address(key), Packed.of(key, {}, os.urandom(300_000)))\n"
    )
    writer = start(shelf, script)
    assert writer.stdout is not None and writer.stdout.readline() == "go\n"
    while not shelf.folder.exists() or not shelf.usage():
        time.sleep(0.001)
    time.sleep(delay_s)
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    names = [path.name for path in shelf.folder.glob("sparse-*")]
    assert names and all(shelf.get(name) is not None for name in names)
    for path in (shelf.folder / ".aside").iterdir():
        os.utime(path, (0, 0))  # long ago
    shelf.trim(float("inf"))
    assert not list((shelf.folder / ".aside").iterdir())


def test_a_lock_holds_against_other_processes_and_ends_with_its_own(shelf: Shelf) -> None:
    script = (
        "lock = shelf.lock(address(KEY))\n"
        "print(lock is not None, flush=True)\n"
        "sys.stdin.readline()\n"
    )
    holder = start(shelf, script)
    assert holder.stdout is not None and holder.stdout.readline() == "True\n"
    assert shelf.lock(NAME) is None
    assert shelf.lock(address(key(1))) is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    lock = shelf.lock(NAME)
    assert lock is not None and shelf.lock(NAME) is None
    lock.end()
    again = shelf.lock(NAME)
    assert again is not None
    again.end()
    assert not (shelf.folder / ".locks" / NAME).exists()


def test_a_silent_holder_loses_its_lock_and_does_not_end_the_next_ones(shelf: Shelf) -> None:
    silent = shelf.lock(NAME)
    assert silent is not None
    os.utime(silent.path, (0, time.time() - module.LEASE_S - 1))
    taken = shelf.lock(NAME)
    assert taken is not None and taken.is_current and not silent.is_current
    silent.renew()
    silent.end()
    assert shelf.lock(NAME) is None
    taken.end()


# --- size ------------------------------------------------------------------------------------


def test_the_least_recently_used_go_first(shelf: Shelf) -> None:
    names = [address(key(number)) for number in range(6)]
    for number, name in enumerate(names):
        shelf.put(name, Packed.of(key(number), {}, bytes(10_000)))
        os.utime(shelf.folder / name, (0, 1000 + number))
    total = shelf.usage()["sparse"][1]
    assert total >= 60_000
    shelf.trim(total)
    assert shelf.usage()["sparse"][0] == 6
    assert shelf.get(names[0]) is not None  # used just now
    shelf.trim(total - 1)  # nine tenths are left
    assert {path.name for path in shelf.folder.glob("sparse-*")} == {names[0], *names[2:]}
    shelf.trim(0)
    assert shelf.usage() == {}


def test_only_entries_are_counted_and_cleared(shelf: Shelf) -> None:
    shelf.put(NAME, PACKED)
    (shelf.folder / "notes.txt").write_text("mine")
    (shelf.folder / "sparse-mine").mkdir()
    assert shelf.usage()["sparse"][0] == 1
    shelf.clear()
    assert shelf.usage() == {} and shelf.get(NAME) is None
    assert (shelf.folder / "notes.txt").exists() and (shelf.folder / "sparse-mine").exists()
