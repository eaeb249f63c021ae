"""A run in a notebook: its tables as HTML, its front as a picture."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from prunesearch.search import ConfigError, Run, parse_config
from prunesearch.search.config import dump_config
from prunesearch.search.records import TrialResult, TrialStatus
from prunesearch.search.store import Store, write_json

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two trials, one of which failed with a message that is no text for a page."""
    config = parse_config(
        {"model": {"name": "resnet20"}, "data": {"name": "digits"}, "search": {"trials": 2}}
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    write_json(
        tmp_path / "baseline.json",
        {"accuracy": 0.9, "macs": 1000, "num_params": 100, "peak_memory_mib": 1.0, "loss": 0.3,
         "latency_ms": 2.0},
    )  # fmt: skip
    store = Store(tmp_path)
    known = {"criterion": "fgp", "accuracy": 0.85, "latency_ms": 1.0, "macs": 500}
    store.write_trial(TrialResult("t00000", TrialStatus.COMPLETED, **known))
    store.write_trial(TrialResult("t00001", TrialStatus.FAILED, message=HOSTILE))
    return Run(tmp_path)


def test_html_shows_the_tables_and_escapes_what_is_in_them(run: Run) -> None:
    html = run._repr_html_()
    assert html.startswith("<pre") and html.count("<pre") == 1
    assert "t00000" in html and "dense" in html and "1 completed" in html
    assert "&lt;script&gt;alert(1)" in html and "<script>" not in html


def test_rich_prints_the_same(run: Run) -> None:
    console = Console(file=io.StringIO(), width=150)
    console.print(run)
    assert "Pareto front" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_plot_shows_itself_and_is_written_where_that_is_asked(run: Run, tmp_path: Path) -> None:
    picture = run.plot()
    assert Image.open(io.BytesIO(picture._repr_png_())).width > 500
    saved = tmp_path / "front.svg"
    run.plot(saved, x="macs").save(tmp_path / "front.png")
    assert "multiply-adds" in saved.read_text() and (tmp_path / "front.png").stat().st_size
    with pytest.raises(ConfigError, match="plot"):
        run.plot(tmp_path / "front.gif")
