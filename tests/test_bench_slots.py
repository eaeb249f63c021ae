"""`bench slots` with real trials on Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import write_config

from prunesearch.search.bench.slots import bench_slots, slots_table
from prunesearch.search.config import ConfigError, load_config
from prunesearch.search.progress import Progress


def test_it_counts_the_trials_of_a_number_of_slots(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), ["baseline.epochs=1"])
    result = bench_slots(config, Progress.silent(), slots=[2], seconds=25)
    assert [row["slots"] for row in result["rows"]] == [2]
    for row in result["rows"]:
        assert row["trials"] >= 2 and row["per_hour"] > 0 and 0 < row["busy"] <= 1
    table = slots_table(result)
    assert list(table.columns[4].cells)[0] == "1.00" and table.row_count == 1


def test_too_many_slots_are_refused_before_anything_starts(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), ["resources.cpu=1"])
    with pytest.raises(ConfigError, match=r"--slots.*=64"):
        bench_slots(config, Progress.silent(), slots=[64], seconds=5)
