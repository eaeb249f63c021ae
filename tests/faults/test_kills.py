"""Processes of a search killed at random moments: nothing is lost, and nothing is run twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import SMALL

from prunesearch.search.bench.kills import bench_kills, kills_markdown
from prunesearch.search.config import ConfigError, parse_config
from prunesearch.search.progress import Progress
from prunesearch.search.yaml_source import read_source

KILLS = 4


def test_a_search_ends_as_if_nothing_had_been_killed(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.replace("trials: 6", "trials: 12"))
    config = parse_config(read_source(path).data)
    result = bench_kills(config, tmp_path / "out", Progress.silent(), kills=KILLS, seed=1)
    assert sum(result["kills"].values()) == KILLS and result["sessions"] >= 2
    assert (result["trials"], result["lost"], result["more"], result["different"]) == (12, 0, 0, 0)
    assert result["completed"] > 0 and result["never_fell"] and result["orphans"] == 0
    assert "| lost | 0 |" in kills_markdown(result, "the command")
    with pytest.raises(ConfigError, match="--out"):
        bench_kills(config, tmp_path / "out", Progress.silent(), kills=1)
