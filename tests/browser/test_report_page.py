"""The report in real headless Chromium: it loads nothing, answers to the keyboard, reads well.

`PRUNE_SEARCH_SCREENSHOTS` names a folder for the pictures; they are made in any case.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, expect, sync_playwright

from prunesearch.search.bench.synthetic import synthetic_run
from prunesearch.search.records import TrialResult, TrialStatus
from prunesearch.search.report import render, report_data
from prunesearch.search.runs import Run
from prunesearch.search.store import Store

CHROMIUM = shutil.which("chromium")
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=2>"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(synthetic_run(tmp_path_factory.mktemp("report") / "run", 150))


@pytest.fixture(scope="module")
def data(run: Run) -> dict[str, Any]:
    return report_data(run)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("PRUNE_SEARCH_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens a report; at the end nothing was requested and nothing complained."""
    wrong: list[str] = []
    pages: list[Page] = []

    def guard(route: Route) -> None:
        if route.request.url.startswith(tmp_path.as_uri()):
            route.continue_()
        else:
            wrong.append(f"request of {route.request.url}")
            route.abort()

    def said(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            wrong.append(f"console: {message.text}")

    def show(data: dict[str, Any], **options: Any) -> Page:
        path = tmp_path / f"report-{len(pages)}.html"
        path.write_text(render(data), encoding="utf-8")
        page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        pages.append(page)
        page.route("**/*", guard)
        page.on("console", said)
        page.on("pageerror", lambda error: wrong.append(f"page error: {error}"))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready=true]", state="attached")
        return page

    yield show
    for page in pages:
        page.close()
    assert wrong == []


def accessible(page: Page) -> str:
    """What axe complains of; empty if it does not."""
    results = Axe().run(page)
    return results.generate_report() if results.violations_count else ""


def test_the_front_in_any_axes_and_a_trial_by_pointer(show: Open, data: dict[str, Any]) -> None:
    page = show(data)
    chart = page.locator("#front-chart")
    before = chart.get_attribute("aria-label")
    assert before is not None and f"{len(data['front'])} trials that no other beats" in before
    page.select_option("#axis-x", "latency_ms@edge")
    assert chart.get_attribute("aria-label") != before
    assert "latency on edge" in (chart.get_attribute("aria-label") or "")
    assert "Latency on edge (ms)" in (page.locator("#front-chart .xtitle").text_content() or "")
    assert "not the axes that the search optimised" in page.inner_text("#front-caption")
    page.select_option("#axis-x", "latency_ms")
    chart.scroll_into_view_if_needed()
    chosen = page.locator("#member-select option:checked").inner_text()
    point = page.locator("#front-chart .scatterlayer .trace path.point").last  # the dense model
    box = point.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2 + 1, box["y"] + box["height"] / 2)
    page.wait_for_selector("#front-card:not([hidden])")
    assert "Dense model" in page.inner_text("#front-card")
    members = page.locator("#front-chart .scatterlayer .trace:nth-last-child(3) path.point")
    box = members.nth(0).bounding_box()  # the first member
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2 + 1)
    name = data["trials"]["id"][data["front"][0]]
    page.wait_for_selector(f"#front-card:has-text('{name}')")
    card = page.inner_text("#front-card")
    assert "Blocks dropped" in card and "Criterion" in card and "Latency on edge" in card
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2 + 1)
    after = page.locator("#member-select option:checked").inner_text()
    assert after.startswith(name) and after != chosen
    assert name in (page.locator("svg.network[role=img]").get_attribute("aria-label") or "")


def test_the_network_shows_kept_widths_and_removed_blocks(
    show: Open, data: dict[str, Any]
) -> None:
    trials, network = data["trials"], data["network"]
    index = next(i for i in data["front"] if len(trials["dropped"][i]) >= 2)
    page = show(data | {"chosen": index})
    dropped = {network["blocks"][place] for place in trials["dropped"][index]}
    gone = {layer["name"] for layer in network["layers"] if layer["group"] in dropped}
    drawing = page.locator("svg.network[role=img]")
    titles = drawing.locator("g.layer title").all_text_contents()
    assert len(titles) == len(network["layers"])
    assert {t.split(":")[0] for t in titles if "removed with its block" in t} == gone
    assert drawing.locator("g.layer.gone").count() == len(gone)
    assert drawing.locator("path.shortcut.alone").count() == len(dropped)
    for place, layer in enumerate(network["layers"]):
        kept = trials["widths"][index][place]
        if kept is not None:
            assert any(
                t.startswith(f"{layer['name']}: {kept} of {layer['dense']} ") for t in titles
            )
            filled = drawing.locator("g.layer").nth(place).locator("rect")
            tall = [float(filled.nth(n).get_attribute("height") or 0) for n in range(2)]
            assert tall[0] / tall[1] == pytest.approx(kept / layer["dense"], abs=0.15)
    page.locator("#member details summary").click()
    assert page.locator("#member details tbody tr").count() == len(network["layers"])


def test_all_of_it_by_keyboard(show: Open, data: dict[str, Any]) -> None:
    page = show(data)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    for _ in range(4):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "front-chart":
            break
    assert page.evaluate("document.activeElement.id") == "front-chart"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    names = [data["trials"]["id"][index] for index in data["front"]]
    page.keyboard.press("Home")
    assert names[0] in page.inner_text("#announcer")
    page.keyboard.press("ArrowRight")
    assert names[1] in page.inner_text("#announcer")
    page.keyboard.press("End")
    assert names[-1] in page.inner_text("#announcer")
    assert page.locator("#member-select option:checked").inner_text().startswith(names[-1])
    assert page.locator("#members tr.marked").inner_text().startswith(names[-1])

    head = page.locator("#trials thead th").nth(3)
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    shown = page.locator("#trials tbody tr td:nth-child(4)").all_inner_texts()
    values = [float(text) for text in shown if text != "–"]
    assert len(shown) == 50 and values == sorted(values, reverse=True)
    page.locator("#trials .pager button", has_text="Next").focus()
    page.keyboard.press("Enter")
    assert page.inner_text("#trials .pager span") == "51 to 100 of 150"
    page.locator("#status-filter").select_option("failed")
    failed = data["state"]["by_status"]["failed"]
    expect(page.locator("#trials tbody tr")).to_have_count(failed)


def test_light_dark_and_print(show: Open, data: dict[str, Any], pictures: Path) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    page = show(data)
    page.screenshot(path=pictures / "report-light.png", full_page=True)
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    assert accessible(page) == ""

    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(paper)
    assert dark == "rgb(20, 23, 27)"
    assert accessible(page) == ""
    page.screenshot(path=pictures / "report-dark.png", full_page=True)
    page.get_by_label("Light", exact=True).check()
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="light")
    page.get_by_label("Dark", exact=True).check()
    assert page.evaluate(paper) == dark

    page.emulate_media(media="print")
    assert page.evaluate(paper) == "rgb(255, 255, 255)"  # whatever was chosen
    controls = page.locator(".controls")
    assert controls.count() > 5 and not any(one.is_visible() for one in controls.all())
    assert page.get_by_text("is not printed").is_visible()
    page.pdf(path=pictures / "report.pdf", format="A4")
    page.set_viewport_size({"width": 760, "height": 1000})
    page.screenshot(path=pictures / "report-print.png", full_page=True)
    widths = "[...document.querySelectorAll('.main-svg')].map(e=>e.getBoundingClientRect().width)"
    assert max(page.evaluate(widths)) <= 760


def test_every_state_of_a_run(
    show: Open, run: Run, tmp_path_factory: pytest.TempPathFactory, pictures: Path
) -> None:
    folder = tmp_path_factory.mktemp("states")
    for name in ("empty", "failed", "stopped"):
        place = folder / name
        place.mkdir()
        files = ("config.yaml", "baseline.json") if name == "stopped" else ("config.yaml",)
        for file in files:
            shutil.copy(run.folder / file, place)
        for row in run.results()[:12] if name != "empty" else ():
            failed = TrialResult(row.trial_id, TrialStatus.FAILED, "boom", started_at=1.0)
            Store(place).write_trial(failed if name == "failed" else row)
        page = show(report_data(Run(place)))
        assert page.locator(f".badge-{name}").is_visible()
        assert accessible(page) == ""
        page.screenshot(path=pictures / f"report-{name}.png", full_page=True)


def test_text_of_others_is_shown_as_it_is_and_runs_nothing(
    show: Open, data: dict[str, Any]
) -> None:
    changed = json.loads(json.dumps(data))
    changed["run"] |= {"model": HOSTILE, "place": HOSTILE}
    changed |= {"notes": [HOSTILE], "config": HOSTILE}
    for name in ("origin", "message", "criterion", "host"):
        found = changed["trials"]["text"][name]
        found["values"] = [HOSTILE for _ in found["values"]]
    for one in (*changed["network"]["layers"], *changed["failures"]):
        one |= {"name": HOSTILE, "cause": HOSTILE}
    changed["network"]["blocks"] = [HOSTILE for _ in changed["network"]["blocks"]]
    changed["columns"][0]["label"] = HOSTILE
    page = show(changed)
    assert page.evaluate("window.hacked === undefined")
    assert page.locator("img").count() == 0
    assert HOSTILE in page.inner_text(".subject")
    assert HOSTILE in page.inner_text("#failures-body")
    assert "<img src=x" in (page.locator("#front-chart .ytitle").text_content() or "")
