"""`prune-search bench report`: many trials in the report and on the live page.

How soon they show, and how fast the pages answer.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ConfigError
from ..environment import environment
from ..report import write_report
from ..runs import Run
from .common import markdown_row, spread
from .serve import served
from .synthetic import synthetic_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

VIEW = {"width": 1280, "height": 900}
READY = "html[data-ready=true]"

_PAINT = """performance.getEntriesByName("first-contentful-paint")[0].startTime"""
_LOADING = f"""() => ({{
  paint_ms: {_PAINT},
  ready_ms: performance.getEntriesByName("report-ready")[0].startTime,
}})"""

_PRESENTED = "await new Promise((r) => requestAnimationFrame(() => requestAnimationFrame(r)));"

INTERACTIONS = {
    "axis_ms": (
        "another horizontal axis",
        """const axis = document.getElementById("axis-x");
        axis.value = axis.value === "macs" ? "latency_ms" : "macs";
        axis.dispatchEvent(new Event("change"));""",
    ),
    "choose_ms": (
        "another member",
        """const list = document.getElementById("member-select");
        list.value = [...list.options].find((one) => !one.selected).value;
        list.dispatchEvent(new Event("change"));""",
    ),
    "sort_ms": (
        "all trials sorted by another column",
        """const heads = document.querySelectorAll("#trials thead button");
        heads[(window.sorted = ((window.sorted || 0) % 5) + 1)].click();""",
    ),
}

LIVE_INTERACTIONS = {
    "live_axis_ms": (
        "another horizontal axis",
        """const axis = document.querySelector("#front select");
        axis.value = axis.value === "macs" ? "latency_ms" : "macs";
        axis.dispatchEvent(new Event("change"));""",
    ),
    "live_sort_ms": ("all trials sorted by another column", INTERACTIONS["sort_ms"][1]),
    "live_filter_ms": (
        "trials of another status",
        """const status = document.querySelector("#trials select");
        status.value = status.value ? "" : "completed";
        status.dispatchEvent(new Event("change"));""",
    ),
}
_ALL_THERE = f"""async (count) => {{
  const isThere = () =>
    document.querySelector("#trials .pager")?.textContent.endsWith(` of ${{count}}`);
  while (!isThere()) await new Promise(requestAnimationFrame);
  {_PRESENTED}
  return performance.now();
}}"""


def bench_report(trials: int, rounds: int) -> dict[str, Any]:
    """Writes the report of an invented run, serves the run, and opens both in Chromium.

    Args:
        trials: Of the run.
        rounds: How often each page is opened.

    Raises:
        ConfigError: If playwright or Chromium is missing.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise ConfigError(
            "`prune-search bench report` must have playwright: it opens a browser. Install the "
            "development dependencies (`uv sync`)."
        ) from error
    chromium = shutil.which("chromium")
    if chromium is None:
        raise ConfigError(
            "`prune-search bench report` must find `chromium` on the PATH: it opens a page. "
            "Install the package chromium."
        )
    with tempfile.TemporaryDirectory(prefix="prune-search-") as folder:
        run = Run(synthetic_run(Path(folder) / "run", trials))
        start = time.perf_counter()
        path = Path(write_report(run))
        result: dict[str, Any] = {"trials": trials, "write_s": time.perf_counter() - start}
        result["mib"] = path.stat().st_size / 2**20
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium)
            opened = [_open(browser, path) for _ in range(rounds)]
            with served(run.folder.parent) as (url, _):
                for one in opened:
                    one |= _open_live(browser, f"{url}/runs/{run.folder.name}", trials)
            result["browser"] = browser.version
            browser.close()
    result["measured"] = {name: [one[name] for one in opened] for name in opened[0]}
    return result | {"environment": environment()}


def report_markdown(result: Mapping[str, Any]) -> str:
    """`bench_report` as a page for results/."""
    here, measured = result["environment"], result["measured"]
    rows = [
        ("report: first contentful paint", spread(measured["paint_ms"], 0)),
        ("report: all figures drawn, every control answers", spread(measured["ready_ms"], 0)),
        *_interactions("report", INTERACTIONS, measured),
        ("live page: first contentful paint", spread(measured["live_paint_ms"], 0)),
        ("live page: all trials there and drawn", spread(measured["live_ready_ms"], 0)),
        *_interactions("live page", LIVE_INTERACTIONS, measured),
    ]
    lines = [
        "# A report and a live page of many trials",
        "",
        f"`prune-search bench report --trials {result['trials']}`: an invented run of ResNet-20 "
        f"with {result['trials']:,} trials, written through the store. The report took "
        f"{result['write_s']:.1f} s to make (reading the ledger and fitting the forests of "
        f"parameter importance included) and has {result['mib']:.1f} MiB, 4.6 of them Plotly. "
        f"Headless Chromium {result['browser']}, {here['cores']} cores of {here['cpu']}, no GPU.",
        "",
        "The live page is that of `prune-search serve` on the same machine. "
        f"Milliseconds, median (range) of {len(measured['paint_ms'])} loads; an interaction is "
        "timed from the event until the frame after the next one begins.",
        "",
        markdown_row(["", "ms"]),
        markdown_row(["---", "---:"]),
        *(markdown_row(row) for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _interactions(
    page: str, asked: Mapping[str, tuple[str, str]], measured: Mapping[str, Any]
) -> list[tuple[str, str]]:
    return [
        (f"{page}, interaction: {label}", spread(measured[name], 0))
        for name, (label, _) in asked.items()
    ]


def _open(browser: Browser, path: Path) -> dict[str, float]:
    page = browser.new_page(viewport=VIEW)  # type: ignore[arg-type]
    page.goto(path.resolve().as_uri(), wait_until="commit", timeout=120_000)
    page.wait_for_selector(READY, state="attached", timeout=120_000)
    found: dict[str, float] = page.evaluate(_LOADING)
    found |= {name: _time(page, code) for name, (_, code) in INTERACTIONS.items()}
    page.close()
    return found


def _open_live(browser: Browser, url: str, trials: int) -> dict[str, float]:
    page = browser.new_page(viewport=VIEW)  # type: ignore[arg-type]
    page.set_default_timeout(120_000)
    page.goto(url, wait_until="commit")
    page.wait_for_selector("main[data-ready]", state="attached")
    ready_ms = page.evaluate(_ALL_THERE, trials)
    found = {"live_paint_ms": page.evaluate(_PAINT), "live_ready_ms": ready_ms}
    found |= {name: _time(page, code) for name, (_, code) in LIVE_INTERACTIONS.items()}
    page.close()
    return found


def _time(page: Page, code: str) -> float:
    """Median of three of the same interaction."""
    script = (
        f"async () => {{ const start = performance.now(); {code} {_PRESENTED} "
        "return performance.now() - start; }"
    )
    return statistics.median(float(page.evaluate(script)) for _ in range(3))
