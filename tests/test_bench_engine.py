"""`bench engine`, tiny, on a real local Ray."""

import json

import pytest
from helpers import command


def test_bench_engine_measures_a_tiny_run() -> None:
    done = command(
        "bench", "engine", "--trials", "10,20", "--default-trials", "", "--pair-s", "0", "--json"
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["growth"]
    assert [row["trials"] for row in rows] == [10, 20]
    for row in rows:
        assert row["sampler"] == "random" and row["driver_mib"] > 50
        assert 0 < row["own_ms"] < row["ms"]
    assert rows[0]["growth"] == 1


@pytest.mark.parametrize("sizes", ["5", "100,50", "x", "20,20"])
def test_sizes_are_checked(sizes: str) -> None:
    done = command("bench", "engine", "--trials", sizes)
    assert done.returncode == 2
    assert f"`--trials` (={sizes}) must be ascending" in done.stderr
