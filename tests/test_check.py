"""`check`: reasons, effective widths, and the MACs that the space reaches."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from prunesearch.methods.measure import count_macs
from prunesearch.methods.surgery import Recipe, prune, whole_columns
from prunesearch.search.checks import check_report
from prunesearch.search.config import parse_config
from prunesearch.search.setup import pose
from prunesearch.search.tables import check_tables


def config_of(**space: Any) -> Any:
    return parse_config(
        {
            "name": "check",
            "model": {"name": "resnet20"},
            "data": {"name": "digits", "image_size": 8, "limit": 400, "calibration_size": 32},
            "space": {"criteria": ["magnitude_l1"], **space},
        }
    )


def test_the_range_of_ratios_is_what_pruning_reaches() -> None:
    config = config_of(select=["ratio"], keep={"per": "model", "low": 0.25, "high": 0.5})
    report = check_report(config)
    problem = pose(config)
    example = problem.task.example_input(2)

    def macs(keep: float, dropped: tuple[str, ...]) -> int:
        kept = {
            group.name: whole_columns(group, range(int(group.num_channels * keep)))
            for group in problem.plan.alive(dropped)
        }
        return count_macs(prune(problem.model, problem.plan, Recipe(dropped, kept)), example)

    low, high = report["macs_range"]
    assert report["macs_range_exact"] is True
    assert high == macs(0.5, ()) < report["macs"]
    blocks = [block["name"] for block in report["blocks"] if block["removable"]]
    assert low == min(macs(0.25, some) for some in combinations(blocks, 3))


def test_without_channels_only_blocks_count() -> None:
    report = check_report(config_of(criteria=[], blocks={"max_drop": 0.5}))
    low, high = report["macs_range"]
    assert report["macs_range_exact"] and high == report["macs"]
    assert low < high and not report["groups"]


@pytest.mark.parametrize("rule", ["cumulative", "global", "peak30", "macs"])
def test_rules_that_rank_scores_say_that_it_is_an_estimate(rule: str) -> None:
    report = check_report(config_of(select=[rule], blocks={"mode": "none"}))
    low, high = report["macs_range"]
    assert 0 < low <= high <= report["macs"]
    assert report["macs_range_exact"] is (rule == "peak30")
    text = "\n".join(part for part in check_tables(report) if isinstance(part, str))
    assert ("estimated with the L1 norms" in text) is (rule != "peak30")
    assert "not prunable: fc: makes the model's output" in text


def test_reasons_are_grouped_in_sentences() -> None:
    config = config_of(keep={"scope": "internal"})
    text = [part for part in check_tables(check_report(config)) if isinstance(part, str)]
    (line,) = [part for part in text if "crosses a residual add" in part]
    assert line.startswith("not prunable: conv1, layer2.0.conv2, layer3.0.conv2: ")
