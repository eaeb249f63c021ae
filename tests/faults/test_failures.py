"""Every kind of failure, produced for real, in one search: each a row, and the rest unharmed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from faults.naughty import CRIMES, crime_of
from helpers import PRUNE_SEARCH

from prunesearch.search.records import TrialResult
from prunesearch.search.runs import Run

TRIALS = 40
CONFIG = f"""\
name: naughty
model: {{name: "faults.naughty:Naughty"}}
data: {{name: digits, image_size: 8, batch_size: 64, limit: 400}}
baseline: {{epochs: 1}}
space:
  criteria: []
  blocks: {{mode: mask, order: sequential, valid: residual, max_drop: 1.0}}
recover: {{epochs: 0}}
objectives: {{accuracy: maximize, macs: minimize}}
search: {{trials: {TRIALS}, sampler: random, seeds: false, sensitivity: false, seed: 10}}
resources: {{max_concurrent: 1, trial_timeout_s: 15, max_retries: 1}}
latency: {{runs: 10}}
cache: {{reuse: none}}
"""
SAYS = {
    "crash": r"its worker crashed: Segmentation fault \(in string_at",
    "memory": "out of memory",
    "nan": "loss is nan",
    "sleep": r"took longer than `resources.trial_timeout_s` \(=15\)",
    "raise": "RuntimeError: of another shape",
    "hang": r"trial_timeout_s` \(=15\) and could not be interrupted \(in commit",
    "exit": "its worker was killed, or ended itself",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Run]:
    """The search of the naughty model, and the same one of an innocent twin."""
    folder = tmp_path_factory.mktemp("failures")
    config = folder / "naughty.yaml"
    config.write_text(CONFIG)
    found = {}
    for innocent in (True, False):
        out = folder / f"out-{innocent}"
        done = subprocess.run(
            [*PRUNE_SEARCH, "run", config, "--out", out]
            + ["--set", f"model.kwargs.innocent={str(innocent).lower()}"],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=500,
            env=os.environ | {"NO_COLOR": "1"} | ({} if innocent else _little_memory()),
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        found[innocent] = Run(out)
    return found


def _little_memory() -> dict[str, str]:
    """Leaves this search, and what else is running, 5 GiB of this machine's memory."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines[:3]}
    used = kib["MemTotal"] - kib["MemAvailable"] + 5 * 2**20
    return {"RAY_memory_usage_threshold": f"{min(0.95, used / kib['MemTotal']):.3f}"}


def by_crime(run: Run) -> dict[str | None, list[TrialResult]]:
    found: dict[str | None, list[TrialResult]] = {}
    for row in run.results():
        if row.status != "duplicate":
            found.setdefault(crime_of(row.dropped_blocks), []).append(row)
    return found


def test_every_trial_is_a_row(runs: dict[bool, Run]) -> None:
    for run in runs.values():
        assert [row.trial_id for row in run.results()] == [f"t{n:05d}" for n in range(TRIALS)]
    assert by_crime(runs[False]).keys() == {*CRIMES, None}


@pytest.mark.parametrize("crime", CRIMES)
def test_a_failure_says_what_happened(runs: dict[bool, Run], crime: str) -> None:
    import re

    for row in by_crime(runs[False])[crime]:
        assert row.status == "failed" and re.search(SAYS[crime], row.message), row.message
        assert "Traceback" not in row.message and row.finished_at is not None


def test_only_what_may_end_otherwise_is_tried_again(runs: dict[bool, Run]) -> None:
    again = {
        crime
        for crime, rows in by_crime(runs[False]).items()
        for row in rows
        if "attempt 2" in row.message
    }
    assert again == {"memory", "exit"}


def test_the_rest_of_the_search_is_unharmed(runs: dict[bool, Run]) -> None:
    twin = {row.trial_id: row for row in runs[True].results()}
    good = by_crime(runs[False])[None]
    assert len(good) >= 10
    for row in good:
        assert row.status == "completed" and row.latency_ms and row.message == ""
        assert row.accuracy == twin[row.trial_id].accuracy
    assert {str(row.status) for row in twin.values()} <= {"completed", "duplicate"}
    assert runs[False].front_results()
