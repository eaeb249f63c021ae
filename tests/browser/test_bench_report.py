"""`prune-search bench report`: both pages of many trials are opened and timed."""

from __future__ import annotations

import shutil

import pytest

from prunesearch.search.bench.report import (
    INTERACTIONS,
    LIVE_INTERACTIONS,
    bench_report,
    report_markdown,
)

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is missing")


def test_both_pages_are_opened_and_answer() -> None:
    result = bench_report(trials=80, rounds=1)
    measured = result["measured"]
    loads = {"paint_ms", "ready_ms", "live_paint_ms", "live_ready_ms"}
    assert measured.keys() == {*loads, *INTERACTIONS, *LIVE_INTERACTIONS}
    assert all(len(values) == 1 and values[0] > 0 for values in measured.values())
    assert measured["live_ready_ms"] >= measured["live_paint_ms"]
    text = report_markdown(result)
    assert text.count("| live page, interaction: ") == len(LIVE_INTERACTIONS)
    assert "--trials 80" in text
