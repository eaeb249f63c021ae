"""`bench recalibration` on a tiny real problem."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import write_config

from prunesearch.search.bench.recalibration import (
    SIZES,
    bench_recalibration,
    recalibration_table,
)
from prunesearch.search.config import ConfigError, load_config
from prunesearch.search.progress import Progress


def test_more_images_come_nearer_to_all_of_them(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), ["baseline.epochs=2"])
    result = bench_recalibration(config, Progress.silent(), candidates=8, seeds=2)
    rows = result["rows"]
    assert [row["images"] for row in rows] == list(SIZES)
    few, many = rows[0], rows[-1]
    assert result["images"]["train"] > few["images"]
    assert max(many["difference"]) < min(few["difference"])
    assert min(many["against_all"]) > 0.9 and len(many["against_final"]) == 2
    assert few["seconds"] < many["seconds"]
    table = recalibration_table(result)
    assert table.row_count == len(SIZES)


def test_it_needs_a_fine_tuning_to_compare_with(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), ["recover.epochs=0"])
    with pytest.raises(ConfigError, match=r"recover\.epochs"):
        bench_recalibration(config, Progress.silent())
