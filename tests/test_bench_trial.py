"""`bench trial`: equal results, every number of its tables, on a tiny problem."""

from __future__ import annotations

import pytest

from prunesearch.search.bench.trial import bench_trial, trial_tables


@pytest.fixture(scope="module")
def result():
    return bench_trial(image_size=8, limit=160, rounds=2)


def test_plain_and_ours_come_to_the_same(result):
    assert result["equal_to_the_last_digit"] is True
    assert result["same_channels"] == 1
    assert result["most_before"] <= 1 / result["images"]["val"]


def test_ratios_count_the_scoring_where_they_say_so(result):
    without, one_epoch = result["rows"]
    assert (without["epochs"], one_epoch["epochs"]) == (0, 1)
    for row in result["rows"]:
        assert len(row["ratio"]) == 2 and row["plain_s"] > 0 < row["ours_s"]
        pairs = zip(row["ratio"], row["ratio_with_scores"], strict=True)
        assert all(whole > with_scores > 0 for whole, with_scores in pairs)
    assert set(result["score_s"]) == {"magnitude_l1", "taylor", "fgp"}


def test_the_tables_say_what_was_measured(result):
    ratios, profile = trial_tables(result)
    assert "equal to the last digit" in str(ratios.caption) and ratios.row_count == 2
    steps = list(profile.columns[0].cells)
    assert steps[2] == "batch norms" and len(steps) == len(result["profile"]) == 9
    shares = [row["seconds"] for row in result["profile"] if not row["tuning"]]
    assert list(profile.columns[2].cells)[2] == f"{shares[2] / sum(shares):.0%}"
