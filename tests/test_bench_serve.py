"""What `prune-search bench serve` says of what it measured."""

from __future__ import annotations

from prunesearch.search.bench.serve import serve_markdown, serve_table

LOAD = {
    "requests": 900, "events": 300, "errors": 0, "p50_ms": 4.0, "p99_ms": 40.0,
    "memory_first_mib": 80.0, "memory_most_mib": 90.0, "cpu_s": 3.0, "readers_cpu_s": 2.0,
}  # fmt: skip


def test_the_table_holds_medians_and_ranges() -> None:
    result = {
        "clients": 200, "streams": 20, "pause_s": 5.0, "load": [LOAD, LOAD | {"p99_ms": 60.0}],
        "alone_s": [50.0, 52.0], "read_s": [51.0, 52.0], "ratios": [1.02, 1.0],
        "environment": {"cpu": "C", "cores": 2},
    }  # fmt: skip
    text = serve_markdown(result, "prune-search bench serve x.yaml")
    assert "`prune-search bench serve x.yaml`" in text and "2 cores of C" in text
    assert "| milliseconds to an answer, 99 of 100 | 50.0 (40.0 to 60.0) |" in text
    assert "| ratio | 1.010 (1.000 to 1.020) |" in text
    assert "| errors | 0 0 |" in text
    assert serve_table(result).row_count == text.count("\n| ") - 2  # head and rule
