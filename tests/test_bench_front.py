"""bench front: every candidate of a small space is measured once; samplers are held to it."""

import math
from pathlib import Path

import pytest

from prunesearch.search.bench.enumerate import Enumeration, enumerate_space
from prunesearch.search.bench.front import LABELS, bench_front, front_markdown, front_table
from prunesearch.search.config import ConfigError, SearchConfig, parse_config
from prunesearch.search.front import front_of
from prunesearch.search.progress import Progress
from prunesearch.search.records import TrialResult, TrialStatus


def config(**changes) -> SearchConfig:
    data = {
        "model": {"name": "resnet20"},
        "data": {"name": "digits", "image_size": 8, "limit": 300, "calibration_size": 32},
        "baseline": {"epochs": 1},
        "space": {
            "criteria": ["magnitude_l1", "random"],
            "select": ["ratio"],
            "blocks": {"mode": "ranked", "order": "sequential", "max_drop": 0.5},
            "keep": {"per": "model", "low": 0.5, "step": 0.25},
        },
        "recover": {"epochs": 0},
        "objectives": {"accuracy": "maximize", "macs": "minimize"},
        "resources": {"max_concurrent": 1},
    }
    return parse_config(data | changes)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("front") / "small"


@pytest.fixture(scope="module")
def result(out: Path) -> dict:
    return bench_front(config(), out, Progress.silent(), seeds=2, budget=10)


def test_every_candidate_is_measured_once(out, result):
    exact = Enumeration(out.with_suffix(".parquet"))
    # 0 to 3 blocks x (2 criteria x 2 fractions below 1, and all channels)
    assert len(exact.rows) == result["candidates"] == 4 * 5
    assert all(0 <= row["accuracy"] <= 1 for row in exact.rows.values())
    dense = max(exact.rows.values(), key=lambda row: row["macs"])
    assert dense["macs"] == exact.facts["baseline"]["macs"]


def test_the_exact_front_is_that_of_all_candidates(out, result):
    rows = Enumeration(out.with_suffix(".parquet")).rows.values()
    every = [TrialResult(f"t{n}", TrialStatus.COMPLETED, **row) for n, row in enumerate(rows)]
    assert result["front"] == len(front_of(every, config().objectives))


def test_every_sampler_is_held_to_it(result):
    assert [row["sampler"] for row in result["rows"]] == list(LABELS)
    assert result["budget"] == result["allowed"] == 2  # a tenth of 20
    for row in result["rows"]:
        assert all(0 < value["low"] <= value["high"] <= 1 for value in row["reached"].values())
    assert front_table(result).row_count == len(LABELS)
    text = front_markdown(result)
    assert all(f"| {label} | " in text for label in LABELS)


def test_a_stored_enumeration_is_read(out, result):
    again = enumerate_space(config(), out.with_suffix(".parquet"), Progress.silent())
    assert len(again.rows) == 20 and math.isclose(
        again.facts["seconds"], result["enumeration"]["seconds"]
    )


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"recover": {"epochs": 1}}, "recover.epochs"),
        ({"space": {"criteria": ["magnitude_l1"], "select": ["ratio"]}}, "space.keep.step"),
    ],
)
def test_what_cannot_be_enumerated_is_refused(tmp_path, changes, key):
    with pytest.raises(ConfigError, match=key):
        enumerate_space(config(**changes), tmp_path / "none.parquet", Progress.silent())
