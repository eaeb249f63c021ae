"""`bench recalibration` on a tiny real problem."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import write_config

from prunesearch.search.bench.recalibration import bench_recalibration, recalibration_table
from prunesearch.search.config import ConfigError, load_config
from prunesearch.search.progress import Progress


def test_more_images_come_nearer_to_all_of_them(tmp_path: Path) -> None:
    overrides = ["baseline.epochs=4", "data.limit=1000"]
    config = load_config(write_config(tmp_path), overrides)
    result = bench_recalibration(config, Progress.silent(), candidates=8, seeds=3)
    few, *_, many = result["rows"]
    assert (few["images"], many["images"]) == (128, 512) and result["images"]["train"] > 512
    assert sum(many["difference"]) < sum(few["difference"])
    assert all(len(many[name]) == 3 for name in ("against_all", "against_final", "difference"))
    assert recalibration_table(result).row_count == len(result["rows"]) == 3


@pytest.mark.parametrize("override", ["recover.epochs=0", "recover.recalibrate_bn=false"])
def test_it_needs_something_to_compare(tmp_path: Path, override: str) -> None:
    config = load_config(write_config(tmp_path), [override])
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        bench_recalibration(config, Progress.silent())


def test_a_small_space_gives_fewer_candidates(tmp_path: Path) -> None:
    overrides = ["baseline.epochs=1", "space.criteria=[]", "space.blocks.mode=ranked"]
    config = load_config(write_config(tmp_path), overrides)
    result = bench_recalibration(config, Progress.silent(), candidates=40, seeds=1)
    assert result["candidates"] == 7  # none to all of six blocks
