"""A run folder on a disk that is full in mid-run: exit code 1, the reason, and nothing lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import SMALL, command, write_config

from prunesearch.search.runs import Run

TRIALS = 12


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2.5 MB: the dense model and one or two pruned ones."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root and the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_run_and_a_resume_finishes_it(
    tmp_path: Path, small_disk: Path
) -> None:
    out = small_disk / "out"
    text = SMALL.replace("trials: 6, early_stop: true", f"trials: {TRIALS}, early_stop: false")
    full = command("run", write_config(tmp_path, text), "--out", out)
    assert full.returncode == 1, full.stderr
    assert "No space left on device" in full.stderr and "Traceback" not in full.stderr
    assert f"prune-search resume {out}" in full.stderr
    before = {row.trial_id: row for row in Run(out).results()}
    assert len(before) < TRIALS and not any(row.status == "failed" for row in before.values())
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    done = command("resume", out)
    assert done.returncode == 0, done.stderr
    after = {row.trial_id: row for row in Run(out).results()}
    assert sorted(after) == [f"t{n:05d}" for n in range(TRIALS)]
    assert all(after[name].finished_at == row.finished_at for name, row in before.items())
    assert not any(row.status == "failed" for row in after.values())
    members = Run(out).front_results()
    assert members and all((out / str(row.weights)).is_file() for row in members)
