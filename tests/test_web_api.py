"""The service over HTTP on loopback: what it answers, whom it refuses, and its events."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import logging
import random
import shutil
import socket
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from web import Served, make_row, make_run, serving, write_rows

from prunesearch.search import cli
from prunesearch.search.front import front_of
from prunesearch.search.locks import locked
from prunesearch.search.runs import Run
from prunesearch.search.store import Store
from prunesearch.search.web import ledger as ledger_module
from prunesearch.search.web import views, watch
from prunesearch.search.web.archive import zipped
from prunesearch.search.web.client import Client, Event, ServeError
from prunesearch.search.web.ledger import Ledger
from prunesearch.search.web.security import SESSION_S, Buckets, Sessions
from prunesearch.search.web.settings import Limits

TOKEN = "correct-horse-battery-staple"
STATIC = Path(watch.__file__).with_name("static")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    make_run(folder, "one", 40)
    make_run(folder, "two", 25, seed=1)
    return folder


@pytest.fixture(scope="module")
def served(results: Path) -> Iterator[Served]:
    with serving(results) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served) -> Client:
    return Client(served.url)


def ask(
    served: Served,
    path: str,
    method: str = "GET",
    body: bytes | None = None,
    **headers: str,
) -> tuple[int, dict[str, str], bytes]:
    """One request, as it is written: no client corrects it."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, sent)
    answer = connection.getresponse()
    found = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    connection.close()
    return found


def problem(found: tuple[int, dict[str, str], bytes]) -> tuple[int, str]:
    status, headers, body = found
    assert headers["content-type"] == "application/problem+json", body
    document = json.loads(body)
    assert document["status"] == status and "Traceback" not in document["detail"]
    return status, document["detail"]


# --- reading ---------------------------------------------------------------------------------


def test_runs_and_their_state(client: Client, results: Path) -> None:
    runs = {run["name"]: run for run in client.runs()}
    assert set(runs) == {"one", "two"}
    assert runs["one"]["finished"] == runs["one"]["trials"] == 40
    assert runs["one"]["state"] == "finished"
    assert runs["one"]["hypervolume"] == pytest.approx(Run(results / "one").hypervolume())
    assert runs["one"]["front"] == [r.trial_id for r in Run(results / "one").front_results()]


def test_a_run_has_its_history(client: Client) -> None:
    run = client.run("one")
    assert run["baseline"]["macs"] == 10_000_000 and run["baseline"]["speedup"] == 1.0
    assert run["directions"]["accuracy"] == "maximize"
    assert "magnitude_l1" in run["config"] and run["times"] == {"trials_s": 12.5}
    volumes = [step["hypervolume"] for step in run["volumes"]]
    assert volumes == sorted(volumes) and volumes[-1] == pytest.approx(run["hypervolume"])
    failed = [t for t in client.trials("one") if t["status"] == "failed"]
    assert run["failures"] == [
        {"message": failed[0]["message"], "count": len(failed), "trial_id": failed[0]["trial_id"]}
    ]


def test_the_report_of_a_run_is_one_file(client: Client, tmp_path: Path) -> None:
    path = client.report("one", tmp_path / "one.html")
    page = path.read_text()
    assert page.startswith("<!DOCTYPE html>") and "t00003" in page
    with pytest.raises(FileExistsError):
        client.report("one", path)
    with pytest.raises(ServeError, match="there is none of that name"):
        client.report("other", tmp_path / "other.html")


def test_a_run_that_is_driven_is_running(results: Path, client: Client) -> None:
    with locked(results / "two", pytest.fail):
        time.sleep(ledger_module.FRESH_S)
        assert client.run("two")["state"] == "running"
    time.sleep(ledger_module.FRESH_S)
    assert client.run("two")["state"] == "finished"


def test_trials_come_in_pages_in_any_order(client: Client) -> None:
    everything = list(client.trials("one", page=7))
    assert [t["trial_id"] for t in everything] == [f"t{n:05d}" for n in range(40)]
    by_macs = list(client.trials("one", sort="macs", order="desc"))
    known = [t["metrics"]["macs"] for t in by_macs if "macs" in t["metrics"]]
    assert known == sorted(known, reverse=True) and len(known) < 40
    assert all("macs" not in t["metrics"] for t in by_macs[len(known) :])
    only = list(client.trials("one", status=["failed", "infeasible"]))
    assert only and {t["status"] for t in only} == {"failed", "infeasible"}
    assert {t["control"] for t in everything} == {None, "random", "uniform"}


def test_a_trial_is_told_in_full(client: Client) -> None:
    trial = client.trial("one", "t00003")
    assert trial["candidate"]["origin"] == "seed: uniform 0.5"
    assert trial["dense_widths"] == {"conv1": 16, "layer1.0.conv1": 16}
    assert trial["widths"].keys() == trial["dense_widths"].keys()
    assert trial["columns"]["host"] == "here" and trial["exportable"] is False
    assert trial["accuracy_by_fidelity"][2] == trial["metrics"]["accuracy"]


@pytest.mark.parametrize(("x", "y"), [(None, None), ("latency_ms", "accuracy"), ("loss", "macs")])
def test_the_front_is_the_search_s_own(
    client: Client, results: Path, x: str | None, y: str | None
) -> None:
    found = client.front("one", x=x, y=y)
    directions = {"accuracy": "maximize"}
    wanted = {m: directions.get(m, "minimize") for m in (found["y"], found["x"])}
    members = front_of(Run(results / "one").results(), wanted)
    assert [m["trial_id"] for m in found["members"]] == [m.trial_id for m in members]


def test_runs_are_compared_by_one_reference_point(client: Client) -> None:
    found = client.compare("one", "two")
    one, two = found["runs"]
    assert (one["name"], two["name"]) == ("one", "two")
    assert one["hypervolume"] == pytest.approx(client.front("one")["hypervolume"])
    assert 0 <= one["covers"] <= 1 and 0 <= two["covers"] <= 1
    again = client.compare("two", "one")
    assert [run["covers"] for run in again["runs"]] == [two["covers"], one["covers"]]


def test_the_document_describes_itself(served: Served) -> None:
    status, _, body = ask(served, "/api/v1/openapi.json")
    document = json.loads(body)
    assert status == 200
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"] and operation["description"], (method, path)
            for code, answer in operation["responses"].items():
                if code[0] in "45":
                    assert list(answer["content"]) == ["application/problem+json"], (path, code)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/api/v1/runs/none", 404, "`run` (=none) must be a run of this folder"),
        ("/api/v1/runs/one/trials/t99999", 404, "`trial` (=t99999) must be a trial of one"),
        ("/api/v1/nothing", 404, "must be one of the service's"),
        ("/api/v1/runs/one/front?x=speed", 422, "Did you mean `speedup`?"),
        ("/api/v1/runs/one/front?x=macs&y=macs", 422, "must be another metric"),
        ("/api/v1/runs/one/trials?sort=nothing", 422, "`sort` (=nothing) must be one of"),
        ("/api/v1/runs/one/trials?limit=0", 422, "`limit` (=0) must be at least 1"),
        ("/api/v1/runs/one/trials?limit=many", 422, "`limit` (=many) must be a whole number"),
        ("/api/v1/compare?a=one&b=one", 422, "must be another run"),
        ("/api/v1/compare?a=one", 422, "`b` must be given"),
        ("/api/v1/runs/one/log", 404, "must have been started by this service"),
        ("/api/v1/exports/0123.zip", 404, "`export_id` (=0123)"),
    ],
)
def test_a_wrong_request_is_told_how_to_mend_it(
    served: Served, path: str, status: int, said: str
) -> None:
    found, detail = problem(ask(served, path))
    assert found == status and said in detail


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/checks", b"{", 422, "`body` must be JSON"),
        ("/checks", b"{}", 422, "`config` must be given"),
        ("/checks", b'{"config": "x", "more": 1}', 422, "`more` (=1)"),
        ("/checks", b'{"config": "model: {name: resnet20}\\ndata: {nme: digits}\\n"}', 422,
         "config.yaml:2:8: `data.nme`"),
        ("/checks", b'{"config": "model: {name: \\"os:system\\"}\\ndata: {name: digits}\\n"}', 403,
         "without --allow-code"),
        ("/checks", b'{"config": "name: one\\nmodel: {name: resnet20}\\ndata: {name: digits}\\n"}',
         409, "`name` (=one) must not be in use"),
        ("/runs", b'{"check_id": "nothing"}', 404, "`check_id` (=nothing)"),
        ("/runs/one/resume", b"{}", 409, "must be unfinished"),
        ("/runs/one/extend", b'{"trials": 0}', 422, "`trials` (=0) must be at least 1"),
        ("/runs/one/stop", b"{}", 409, "must be a run in progress"),
        ("/runs/none/stop", b"{}", 404, "`run` (=none)"),
        ("/runs/one/trials/t00000/export", b'{"format": "pickle"}', 422, "`format` (=pickle)"),
        ("/session", b'{"token": "x"}', 409, "asks for none"),
    ],
)  # fmt: skip
def test_a_wrong_order_is_refused(
    served: Served, path: str, body: bytes, status: int, said: str
) -> None:
    found, detail = problem(
        ask(served, f"/api/v1{path}", "POST", body, Content_Type="application/json")
    )
    assert found == status and said in detail


@pytest.mark.parametrize(
    "name", ["..", "%2e%2e", "..%2f..%2fetc", "%2e%2e%2fone", ".serve", "one%00", "a%2fb", "-x"]
)
@pytest.mark.parametrize("form", ["/api/v1/runs/{}", "/api/v1/runs/{}/log", "/runs/{}"])
def test_names_do_not_lead_elsewhere(served: Served, name: str, form: str) -> None:
    status, _, body = ask(served, form.format(name))
    assert status in (404, 422) and b"root:" not in body


def test_links_do_not_lead_elsewhere(tmp_path: Path, results: Path) -> None:
    folder = tmp_path / "results"
    (tmp_path / "outside").mkdir()
    make_run(folder, "honest", 5)
    (folder / "linked").symlink_to(results / "one")
    (folder / "inside").mkdir()
    shutil.copy(folder / "honest" / "config.yaml", folder / "inside")
    (folder / "inside" / "trials").symlink_to(results / "one" / "trials")
    with serving(folder) as served:
        assert [run["name"] for run in Client(served.url).runs()] == ["honest"]
        for name in ("linked", "inside"):
            status, detail = problem(ask(served, f"/api/v1/runs/{name}"))
            assert status == 403 and "is a link" in detail


def test_a_failure_of_its_own_stays_with_it(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("a secret of the service")

    monkeypatch.setattr(views, "front", broken)
    monkeypatch.setattr(logging.getLogger("prunesearch.serve"), "propagate", True)
    status, detail = problem(ask(served, "/api/v1/runs/one/front"))
    assert status == 500 and "secret" not in detail
    wait_until(lambda: "a secret of the service" in caplog.text)  # for its own people


def test_what_a_config_may_name(client: Client) -> None:
    options = client.options()
    assert "resnet20" in options["zoo"] and "digits" in options["data set"]
    assert "magnitude_l1" in options["criterion"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_another_name_is_refused(served: Served, host: str) -> None:
    status, detail = problem(ask(served, "/api/v1/runs", Host=host))
    assert status == 403 and "--allow-host" in detail


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:8090"])
def test_loopback_s_names_are_known(served: Served, host: str) -> None:
    assert ask(served, "/api/v1/runs", Host=host)[0] == 200


def test_other_sites_may_not_use_it(served: Served) -> None:
    here = f"127.0.0.1:{served.port}"
    order = {"Content_Type": "application/json"}
    path = "/api/v1/runs/one/stop"
    for foreign in ("http://evil.example", "null", f"http://localhost:{served.port}"):
        assert ask(served, path, "POST", b"{}", Origin=foreign, **order)[0] == 403
        assert ask(served, "/api/v1/runs", Origin=foreign)[0] == 403
    assert ask(served, "/api/v1/runs", Sec_Fetch_Site="cross-site")[0] == 403
    assert ask(served, "/", Sec_Fetch_Site="cross-site")[0] == 200  # a link may lead here
    assert ask(served, path, "POST", b"{}", Origin=f"http://{here}", **order)[0] == 409


def test_every_answer_is_marked(served: Served) -> None:
    for path in ("/", "/login", "/runs/one", "/static/app.js", "/api/v1/runs", "/api/v1/none"):
        _, headers, _ = ask(served, path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == ("no-cache" if "static" in path else "no-store")
        assert "server" not in headers


def test_pages_hold_no_markup_from_text_and_nothing_from_elsewhere() -> None:
    files = sorted(STATIC.iterdir())
    assert {path.suffix for path in files} == {".html", ".css", ".js", ".svg"}
    for path in files:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        for forbidden in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(",
                          "http://", "https://", "onclick=", "<style", 'style="'):  # fmt: skip
            assert forbidden not in text, (path.name, forbidden)
    for page in ("page.html", "login.html"):
        text = (STATIC / page).read_text()
        assert text.count("<script") == text.count('<script type="module" src="/static/') == 1


# --- the token -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def closed(results: Path) -> Iterator[Served]:
    with serving(results, token=TOKEN, limits=Limits(logins_at_once=50)) as found:
        yield found


def test_nothing_is_told_without_the_token(closed: Served) -> None:
    for path in ("/api/v1/runs", "/api/v1/openapi.json", "/api/v1/runs/one/events", "/api/v1/x"):
        status, _ = problem(found := ask(closed, path))
        assert status == 401 and found[1]["www-authenticate"] == "Bearer"
    status, headers, _ = ask(closed, "/runs/one?a=b")
    assert (status, headers["location"]) == (303, "/login?next=%2Fruns%2Fone%3Fa%3Db")
    for path in ("/login", "/static/app.js", "/static/style.css"):
        assert ask(closed, path)[0] == 200
    with pytest.raises(ServeError, match="`token` must be") as refused:
        Client(closed.url, "wrong").runs()
    assert refused.value.status == 401


def test_the_token_opens(closed: Served) -> None:
    client = Client(closed.url, TOKEN)
    assert len(client.runs()) == 2 and client.health()["asks_token"] is True


def test_a_cookie_opens_until_it_is_changed(closed: Served) -> None:
    order = {"Content_Type": "application/json"}
    body = json.dumps({"token": TOKEN}).encode()
    status, headers, _ = ask(closed, "/api/v1/session", "POST", body, **order)
    set_cookie = headers["set-cookie"]
    cookie = set_cookie.partition(";")[0]
    assert status == 204 and TOKEN not in cookie
    assert "HttpOnly" in set_cookie and "samesite=strict" in set_cookie.lower()
    assert ask(closed, "/api/v1/runs", Cookie=cookie)[0] == 200
    name, _, value = cookie.partition("=")
    until, _, signature = value.partition(".")
    for forged in (f"{int(until) + 1}.{signature}", f"{until}.", until, TOKEN, "", "x" * 64):
        assert ask(closed, "/api/v1/runs", Cookie=f"{name}={forged}")[0] == 401
    wrong = ask(closed, "/api/v1/session", "POST", b'{"token": "no"}', **order)
    assert problem(wrong)[0] == 401 and "set-cookie" not in wrong[1]
    _, headers, _ = ask(closed, "/api/v1/session", "DELETE", Cookie=cookie)
    assert "max-age=0" in headers["set-cookie"].lower()


def test_a_cookie_ends_and_another_token_s_is_none() -> None:
    now = [1000.0]
    sessions = Sessions(TOKEN, 8090, now=lambda: now[0])
    cookie = sessions.new()
    assert sessions.valid(cookie) and not Sessions(TOKEN + "!", 8090, lambda: now[0]).valid(cookie)
    now[0] += SESSION_S + 1
    assert not sessions.valid(cookie)


def test_guessing_is_slow(results: Path) -> None:
    with serving(
        results, token=TOKEN, limits=Limits(logins_per_s=1e-3, logins_at_once=3)
    ) as found:
        statuses = [ask(found, "/api/v1/runs", Authorization=f"Bearer {n}")[0] for n in range(5)]
        assert statuses == [401, 401, 401, 429, 429]
        assert Client(found.url, TOKEN).runs()  # who knows it is not kept out


# --- limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["Content-Length: 300000", "Transfer-Encoding: chunked"])
def test_large_bodies_are_refused(served: Served, head: str) -> None:
    size = 50_000 if "chunked" in head else 0
    chunk = b"%x\r\n" % size + b"x" * size + b"\r\n"
    order = f"POST /api/v1/checks HTTP/1.1\r\nHost: localhost\r\n{head}\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as client:
        client.sendall(f"{order}Content-Type: application/json\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):  # the service need not read on
            for _ in range(8 if size else 0):
                client.sendall(chunk)
        answer = http.client.HTTPResponse(client)
        answer.begin()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        assert problem((answer.status, headers, answer.read()))[0] == 413


def test_rates_are_bounded(results: Path) -> None:
    limits = Limits(reads_per_s=1e-3, reads_at_once=4, writes_per_s=1e-3, writes_at_once=2)
    with serving(results, limits=limits) as found:
        reads = [ask(found, "/api/v1/health") for _ in range(6)]
        assert [answer[0] for answer in reads] == [200, 200, 200, 200, 429, 429]
        assert int(reads[-1][1]["retry-after"]) > 0
        order = {"Content_Type": "application/json"}
        writes = [ask(found, "/api/v1/runs", "POST", b"{}", **order)[0] for _ in range(3)]
        assert writes == [422, 422, 429]


def test_buckets_fill_again_and_forget() -> None:
    now = [0.0]
    buckets = Buckets(2.0, 3, now=lambda: now[0])
    assert [buckets.take("a") for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    now[0] = 0.5
    assert buckets.take("a") == 0.0 and buckets.take("a") > 0
    for n in range(Buckets.MOST + 10):
        buckets.take(f"client {n}")
    assert len(buckets._known) == Buckets.MOST


# --- events ----------------------------------------------------------------------------------


def take(events: Iterator[Event], until: Callable[[Event], bool]) -> list[Event]:
    found = []
    for event in events:
        found.append(event)
        if until(event):
            return found
    raise AssertionError(f"the stream ended after {[event.kind for event in found]}")


def is_progress(event: Event) -> bool:
    return event.kind == "progress"


def test_events_tell_all_and_then_what_is_new(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "live", 6)
    store, draw = Store(folder), random.Random(5)
    with serving(tmp_path) as served:
        events = Client(served.url, timeout_s=30).events("live")
        start, trials, progress = take(events, is_progress)
        assert (start.kind, trials.kind) == ("start", "trials")
        assert start.data["columns"][:2] == ["trial_id", "status"]
        assert len(trials.data) == progress.data["summary"]["finished"] == 6
        store.write_trial(make_row(7, draw))
        news = take(events, is_progress)
        assert [event.kind for event in news] == ["trials", "progress"]
        assert [row[0] for row in news[0].data] == ["t00007"]
        store.compact()  # nothing is new in it
        store.write_trial(make_row(8, draw))
        news = take(events, is_progress)
        assert [row[0] for row in news[0].data] == ["t00008"]
        again = take(Client(served.url).events("live", news[-1].cursor), is_progress)
        assert [event.kind for event in again] == ["progress"]
        shutil.rmtree(folder)
        (gone,) = take(events, lambda event: event.kind == "gone")[-1:]
        assert "must be a run folder" in gone.data["detail"]
        assert list(events) == []


def test_many_follow_one_watcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path, "live", 6)
    looks = []
    look = Ledger._look

    def counted(self: Ledger) -> Any:
        looks.append(time.monotonic())
        return look(self)

    monkeypatch.setattr(Ledger, "_look", counted)
    with serving(tmp_path, limits=Limits(streams=10)) as served:
        clients = [Client(served.url, timeout_s=30).events("live") for _ in range(10)]
        for events in clients:
            take(events, is_progress)
        with pytest.raises(ServeError, match="`streams` must be at most 10"):
            next(Client(served.url).events("live"))
        before = len(looks)
        Store(folder).write_trial(make_row(7, random.Random(5)))
        for events in clients:
            assert take(events, is_progress)[0].data[0][0] == "t00007"
        assert len(looks) - before <= 4  # a look a second, not one for each client
        for events in clients:
            events.close()  # type: ignore[attr-defined]
        deadline = time.monotonic() + 20
        while served.app.service.watches._known and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not served.app.service.watches._known


def test_who_does_not_read_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "TAKEN_WITHIN_S", 3.0)
    folder = make_run(tmp_path, "large", 1)
    draw = random.Random(0)
    rows = [make_row(n, draw) for n in range(1, 4_000)]
    write_rows(Store(folder), rows)
    with serving(tmp_path, buffer=4096) as served, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", served.port))
        slow.sendall(b"GET /api/v1/runs/large/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        watches = served.app.service.watches
        wait_until(lambda: watches._known)
        wait_until(lambda: not watches._known)


def wait_until(is_so: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- the ledger ------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "FRESH_S", 0.0)


@pytest.mark.usefixtures("impatient")
def test_only_new_parts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = ledger_module.read_results

    def counted(path: Path) -> Any:
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(ledger_module, "read_results", counted)
    folder = make_run(tmp_path, "live", 50)
    ledger = Ledger(folder)
    first = ledger.snapshot()
    assert len(first.rows) == 50 and len(read) == 2
    assert ledger.snapshot() is first and len(read) == 2
    Store(folder).write_trial(make_row(60, random.Random(0)))
    second = ledger.snapshot()
    assert read[2:] == ["t00060.parquet"] and len(first.rows) == 50 and len(second.rows) == 51
    assert [values[0] for _, values in second.after(first.cursor)] == ["t00060"]
    assert second.after(second.cursor) == [] and len(second.after("other-3")) == 51


@pytest.mark.usefixtures("impatient")
def test_a_trial_that_goes_on_replaces_its_row(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "live", 3)
    ledger, draw = Ledger(folder), random.Random(3)
    row = make_row(4, draw)
    row.status, row.fidelity = "early_stopped", 0  # type: ignore[assignment]
    Store(folder).write_trial(row)
    before = ledger.snapshot()
    assert before.summary.by_status["early_stopped"] == 1
    Store(folder).write_trial(make_row(4, draw))
    after = ledger.snapshot()
    assert "early_stopped" not in after.summary.by_status and len(after.rows) == 4


@pytest.mark.usefixtures("impatient")
def test_a_damaged_part_is_noted_and_the_others_are_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "live", 8)
    ledger = Ledger(folder)
    ledger.snapshot()
    (folder / "trials" / "t00099.parquet").write_bytes(b"PAR1 no")
    snapshot = ledger.snapshot()
    assert len(snapshot.rows) == 8 and "not readable Parquet" in snapshot.summary.message
    assert "not readable" in ledger.snapshot().summary.message


@pytest.mark.usefixtures("impatient")
def test_rows_that_are_taken_away_are_gone(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "live", 4)
    Store(folder).write_trial(make_row(9, random.Random(0)))
    ledger = Ledger(folder)
    assert len(ledger.snapshot().rows) == 5
    (folder / "trials" / "t00009.parquet").unlink()
    assert len(ledger.snapshot().rows) == 4


@pytest.mark.usefixtures("impatient")
def test_an_extended_run_has_more_to_do(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "live", 4)
    ledger = Ledger(folder)
    assert ledger.snapshot().summary.state == "finished"
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("trials: 4", "trials: 9"))
    summary = ledger.snapshot().summary
    assert (summary.state, summary.trials, summary.finished) == ("interrupted", 9, 4)


# --- archives and the command ----------------------------------------------------------------


def test_an_archive_holds_the_folder_and_no_links(tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "weights.bin").write_bytes(random.Random(0).randbytes(700_000))
    (folder / "recipe.json").write_text("{}")
    (folder / "link").symlink_to("/etc/hostname")
    pieces = list(zipped(folder))
    assert max(map(len, pieces)) < 300_000
    with zipfile.ZipFile(io.BytesIO(b"".join(pieces))) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["exported/deep/weights.bin", "exported/recipe.json"]
        weights = archive.read("exported/deep/weights.bin")
    assert weights == (folder / "deep" / "weights.bin").read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "must be 127.0.0.1 without a token"),
        (["--host", "nowhere.invalid", "--token-file", "token"], "must be an address of this"),
        (["--token-file", "none"], "`--token-file` (=none) must be a file with a token"),
        (["--token-file", "short"], "at least 16 printable ASCII characters"),
        (["--address", "auto"], "must be the cluster's job server"),
        (["nothing"], "`RESULTS_DIR` (=nothing) must be a folder"),
    ],
)
def test_a_service_that_may_not_start_says_why(
    options: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "short").write_text("short")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prune-search", "serve", "--port", "0", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_port_in_use_is_named(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    arguments = ["prune-search", "serve", str(tmp_path), "--port", str(served.port)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "must be free on 127.0.0.1" in capsys.readouterr().err


def test_the_client_says_that_nobody_answers() -> None:
    with pytest.raises(ServeError, match="must be that of a running service"):
        Client("http://127.0.0.1:9").runs()


def test_the_client_needs_nothing_installed() -> None:
    import subprocess

    script = (
        "import sys\n"
        "import prunesearch.search.web.client\n"
        "heavy = {'fastapi', 'uvicorn', 'pydantic', 'torch', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
