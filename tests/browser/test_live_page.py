"""The pages in a real Chromium: live, by keyboard, in the dark, on a phone, without the token.

Screenshots of every page go to the folder in PRUNE_SEARCH_SCREENSHOTS, else to pytest's own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from helpers import PRUNE_SEARCH, SMALL
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from web import make_run, serving

from prunesearch.search import load_pruned

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium")
LONG = SMALL.replace("trials: 6, early_stop: true", "trials: 60, early_stop: false")
TOKEN = "correct-horse-battery-staple"
PAGES = {
    "runs": "/",
    "run": "/runs/one",
    "trial": "/runs/one/trials/t00003",
    "failed": "/runs/one/trials/t00005",
    "compare": "/compare?a=one&b=two",
    "new": "/new",
    "login": "/login",
}
LOOKS = {"light": (1280, "light"), "dark": (1280, "dark"), "narrow": (360, "light")}
WAIT_MS = 240_000
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    make_run(folder, "one", 60)
    make_run(folder, "two", 40, seed=1)
    make_run(folder, "large", 10_000, seed=2)
    return folder


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("PRUNE_SEARCH_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def service(results: Path) -> Iterator[str]:
    """The command itself; Ctrl-C ends it in order."""
    command = [*PRUNE_SEARCH, "serve", str(results), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=results.parent
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving "), process.communicate(timeout=60)
    yield line.partition(" at ")[2].partition(" ")[0]
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert said.strip().endswith("The service has ended.") and "Traceback" not in said


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield launched
        launched.close()


Open = Callable[..., Page]


@pytest.fixture
def new_page(browser: Browser) -> Iterator[Open]:
    """Opens pages; none may complain or reach for another machine."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    def open_page(url: str, width: int = 1280, scheme: str = "light", csp: bool = True) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,  # type: ignore[arg-type]
            bypass_csp=not csp,
            accept_downloads=True,
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda r: None if r.url.startswith(url[:20]) else complaints.append(r.url)
        )
        page.complaints = complaints  # type: ignore[attr-defined]
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def ready(page: Page) -> Page:
    expect(page.locator("main[data-ready], #login")).to_be_attached()
    return page


# --- each page ---------------------------------------------------------------------------------


@pytest.mark.parametrize("look", LOOKS)
def test_pages_are_whole_and_accessible(
    service: str, new_page: Open, shots: Path, look: str
) -> None:
    width, scheme = LOOKS[look]
    for name, path in PAGES.items():
        page = ready(new_page(service + path, width, scheme, csp=False))
        if name == "run":
            expect(page.locator(".plot a").first).to_be_attached()
            page.locator("summary", has_text="as a table").click()
        page.wait_for_timeout(400)  # the charts are drawn after a pause
        page.screenshot(path=shots / f"{name}-{look}.png", full_page=True)
        found = Axe().run(page)
        assert found.violations_count == 0, f"{name}: {found.generate_report()}"
        overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert overflow <= 0, f"{name} is {overflow} pixels too wide"
        page.context.close()


def test_a_run_shows_its_front_and_its_texts_as_texts(service: str, new_page: Open) -> None:
    page = ready(new_page(f"{service}/runs/one"))
    expect(page.locator("h1")).to_have_text("one")
    expect(page.locator(".badge").first).to_have_text("finished")
    members = page.locator(".plot a")
    expect(members.first).to_be_visible()
    before = members.count()
    page.get_by_label("across").select_option("num_params")
    page.get_by_label("up", exact=True).select_option("loss")
    expect(page.locator(".plot .name").first).to_contain_text("parameters (k)")
    assert before > 0
    failure = page.locator("#failures td.message").first
    expect(failure).to_have_text("RuntimeError: <img src=x onerror=alert(1)> & more")
    assert page.locator("main img").count() == 0
    page.get_by_label("status").select_option("failed")
    rows = page.locator("#trials tbody tr")
    expect(rows).to_have_count(5)
    page.get_by_label("status").select_option("")
    page.locator("#trials thead button", has_text="multiply-adds").click()
    first = page.locator("#trials tbody tr").first
    expect(page.locator("#trials th[aria-sort]")).to_have_attribute("aria-sort", "ascending")
    smallest = first.locator("th").inner_text()
    first.locator("a").click()
    expect(page.locator("h1")).to_have_text(f"{smallest} of one")
    expect(page.locator("section", has_text="Widths").locator(".share").first).to_be_visible()


def test_a_report_is_downloaded_and_opens(service: str, new_page: Open, tmp_path: Path) -> None:
    page = ready(new_page(f"{service}/runs/one"))
    with page.expect_download() as download:
        page.get_by_role("link", name="Report").click()
    assert download.value.suggested_filename == "one-report.html"
    download.value.save_as(tmp_path / "one.html")
    assert "<!DOCTYPE html>" in (tmp_path / "one.html").read_text()[:20]


def test_two_runs_are_compared(service: str, new_page: Open) -> None:
    page = ready(new_page(f"{service}/runs/one"))
    page.get_by_role("link", name="Compare").last.click()
    ready(page)
    expect(page.locator("h1")).to_have_text("Compare two runs")
    page.get_by_label("with").select_option("two")
    expect(page.locator("thead th a")).to_have_text(["one", "two"])
    expect(page.locator("tbody tr").nth(2)).to_contain_text("hypervolume")
    assert page.locator(".plot g:nth-of-type(2) a").count() > 0
    page.get_by_label("across").select_option("latency_ms")
    expect(page.locator(".plot .name").first).to_contain_text("latency (ms)")
    assert "x=latency_ms" in page.url


def test_ten_thousand_trials_can_be_hovered_and_clicked(service: str, new_page: Open) -> None:
    page = ready(new_page(f"{service}/runs/large"))
    expect(page.locator(".pager")).to_contain_text("of 10000", timeout=60_000)
    canvas = page.locator(".plot canvas")
    box = canvas.bounding_box()
    assert box is not None
    tip = page.locator(".tip")
    place = next(
        (x, y)
        for x in range(120, int(box["width"]) - 40, 25)
        for y in range(60, int(box["height"]) - 80, 25)
        if _hovered(page, box["x"] + x, box["y"] + y)
    )
    trial = tip.locator("strong").inner_text().partition(",")[0]
    page.mouse.click(box["x"] + place[0], box["y"] + place[1])
    expect(page.locator("h1")).to_have_text(f"{trial} of large")


def _hovered(page: Page, x: float, y: float) -> bool:
    page.mouse.move(x, y)
    return page.locator(".tip").is_visible()


def test_everything_can_be_reached_by_keyboard(service: str, new_page: Open) -> None:
    page = ready(new_page(f"{service}/runs/one"))
    expect(page.locator(".plot a").first).to_be_attached()
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    page.keyboard.press("?")
    expect(page.locator("#keys")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#keys")).to_be_hidden()
    page.keyboard.press("t")
    page.keyboard.press("Enter")
    expect(page.locator("#trials th").first).to_have_attribute("aria-sort", "descending")
    page.keyboard.press("f")
    expect(page.locator(".tip")).to_be_visible()
    member = page.locator(".tip strong").inner_text().partition(",")[0]
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text(f"{member} of one")
    page.keyboard.press("n")
    expect(page.locator("h1")).to_have_text("New search")
    page.keyboard.press("Tab")
    page.locator("#f-name").focus()
    page.keyboard.type("rcn?")  # in a field keys are letters
    expect(page.locator("h1")).to_have_text("New search")


# --- the token ---------------------------------------------------------------------------------


def test_the_token_is_asked_for(results: Path, new_page: Open) -> None:
    with serving(results, token=TOKEN) as served:
        page = new_page(f"{served.url}/runs/one")
        expect(page.locator("h1")).to_have_text("Log in")
        page.get_by_label("Token").fill("not it")
        page.get_by_role("button", name="Log in").click()
        expect(page.locator("#wrong")).to_have_text("That is not this service's token.")
        complaints = page.complaints  # type: ignore[attr-defined]
        assert len(complaints) == 1 and "401" in complaints.pop()
        page.get_by_label("Token").fill(TOKEN)
        page.keyboard.press("Enter")
        expect(page.locator("h1")).to_have_text("one")
        expect(page.locator(".plot a").first).to_be_attached()  # events take the cookie
        (cookie,) = page.context.cookies()
        assert cookie["httpOnly"] and cookie["sameSite"] == "Strict"
        page.get_by_role("button", name="Log out").click()
        expect(page.locator("h1")).to_have_text("Log in")
        page.goto(served.url)
        expect(page.locator("h1")).to_have_text("Log in")


# --- a real search -----------------------------------------------------------------------------


def test_a_search_from_its_config_to_the_archive(
    service: str, results: Path, new_page: Open, shots: Path, tmp_path: Path
) -> None:
    page = ready(new_page(f"{service}/new"))
    _refuse_a_wrong_config(page)
    page.locator("#file").set_input_files(
        {"name": "small.yaml", "mimeType": "text/yaml", "buffer": LONG.encode()}
    )
    expect(page.locator("#config")).to_have_value(LONG)
    page.get_by_role("button", name="Check").click()
    start = page.get_by_role("button", name="Start 60 trials")
    expect(start).to_be_focused(timeout=WAIT_MS)
    page.screenshot(path=shots / "checked-light.png", full_page=True)
    start.click()
    page.wait_for_url("**/runs/small", timeout=WAIT_MS)
    ready(page)
    badge = page.locator("main .badge").first
    expect(badge).to_have_text("running", timeout=WAIT_MS)
    rows = page.locator("#trials tbody th")
    expect(rows.nth(1)).to_be_visible(timeout=WAIT_MS)  # nobody has loaded the page again
    expect(page.locator(".plot a").first).to_be_attached(timeout=WAIT_MS)
    page.screenshot(path=shots / "live-light.png", full_page=True)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".note.good")).to_contain_text("was asked to stop")
    expect(badge).to_have_text("interrupted", timeout=WAIT_MS)
    page.get_by_label("Trials to add").fill("1")
    page.get_by_role("button", name="Extend").click()
    expect(badge).to_have_text("running", timeout=WAIT_MS)
    expect(page.locator("progress").first).to_have_attribute("max", "61")
    page.get_by_role("button", name="Stop").click()
    expect(badge).to_have_text("interrupted", timeout=WAIT_MS)
    _export(page, shots, tmp_path)
    assert (results / "small" / "front.parquet").is_file()


def _refuse_a_wrong_config(page: Page) -> None:
    page.locator("#config").fill("model: {name: resnet2}\ndata: {name: digits}\n")
    page.get_by_role("button", name="Check").click()
    said = page.locator(".note.bad")
    expect(said).to_contain_text("config.yaml:1:15: `model.name` (=resnet2)", timeout=WAIT_MS)
    complaints = page.complaints  # type: ignore[attr-defined]
    assert len(complaints) == 1 and "422" in complaints.pop()


def _export(page: Page, shots: Path, folder: Path) -> None:
    page.locator(".plot a").last.click()
    page.get_by_role("button", name="Export").click()
    link = page.get_by_role("link", name="Download")
    expect(link).to_be_visible(timeout=WAIT_MS)
    page.screenshot(path=shots / "exported-light.png", full_page=True)
    with page.expect_download() as download:
        link.click()
    download.value.save_as(folder / "member.zip")
    with zipfile.ZipFile(folder / "member.zip") as archive:
        archive.extractall(folder)
    (exported,) = [path for path in folder.iterdir() if path.is_dir()]
    assert exported.name.startswith("small-t")
    assert not load_pruned(exported).training
