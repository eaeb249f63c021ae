"""Processes of a search killed at random moments: nothing is lost, and nothing is run twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import SMALL

from prunesearch.search.bench.kills import bench_kills, kills_markdown
from prunesearch.search.config import ConfigError, parse_config
from prunesearch.search.progress import Progress
from prunesearch.search.yaml_source import read_source

KILLS, PAUSE_S = 4, 4.0


def test_a_search_ends_as_if_nothing_had_been_killed(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.replace("trials: 6", "trials: 24"))
    config = parse_config(read_source(path).data)
    result = bench_kills(
        config, tmp_path / "out", Progress.silent(), kills=KILLS, seed=1, pause_s=PAUSE_S
    )
    assert 2 <= sum(result["kills"].values()) <= KILLS
    assert (result["trials"], result["lost"], result["more"], result["different"]) == (24, 0, 0, 0)
    assert result["completed"] > 0 and result["never_fell"] and result["orphans"] == 0
    assert "| lost | 0 |" in kills_markdown(result, "the command")
    with pytest.raises(ConfigError, match="--out"):
        bench_kills(config, tmp_path / "out", Progress.silent(), kills=1)
