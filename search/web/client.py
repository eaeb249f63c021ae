"""A client of the REST API, with Python's standard library only.

from prunesearch.search.web.client import Client

client = Client("http://127.0.0.1:8090")
check = client.check(Path("examples/digits.yaml").read_text())
client.start(check["check_id"])
for event in client.events(check["name"]):
    print(event.kind)
"""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode, urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ServeError(RuntimeError):
    """A request that the service refused; `str(error)` is its message.

    Attributes:
        status: The HTTP status; 0 if nobody answered.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Event:
    """One event of a run's stream.

    Attributes:
        kind: start, trials, progress or gone.
        data: What it says.
        cursor: Where to go on after it; None if it does not say.
    """

    kind: str
    data: Any
    cursor: str | None


class Client:
    """Talks to one service.

    Args:
        url: Such as http://127.0.0.1:8090.
        token: The service's, if it has one.
        timeout_s: Until an answer; checks and exports take longer and have their own.
    """

    def __init__(self, url: str, token: str | None = None, *, timeout_s: float = 60.0) -> None:
        self._base = url.rstrip("/") + "/api/v1"
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout_s = timeout_s
        direct = urlsplit(url).hostname in LOOPBACK  # a proxy cannot reach this machine's own
        handlers = [urllib.request.ProxyHandler({})] if direct else []
        self._opener = urllib.request.build_opener(*handlers)

    def health(self) -> dict[str, Any]:
        """The service's version, and what it may do."""
        return self._get("/health")

    def runs(self) -> list[dict[str, Any]]:
        """A summary of each run."""
        return list(self._get("/runs")["runs"])

    def run(self, name: str) -> dict[str, Any]:
        """One run."""
        return self._get(f"/runs/{quote(name)}")

    def front(self, name: str, *, x: str | None = None, y: str | None = None) -> dict[str, Any]:
        """The non-dominated trials in two metrics, by default the objectives."""
        return self._get(f"/runs/{quote(name)}/front", x=x, y=y)

    def trials(
        self,
        name: str,
        *,
        status: Sequence[str] = (),
        sort: str = "trial_id",
        order: str = "asc",
        page: int = 500,
    ) -> Iterator[dict[str, Any]]:
        """All trials, page by page."""
        offset = 0
        while True:
            asked = {"sort": sort, "order": order, "offset": offset, "limit": page}
            found = self._get(f"/runs/{quote(name)}/trials", status=list(status), **asked)
            yield from found["trials"]
            offset += len(found["trials"])
            if not found["trials"] or offset >= found["total"]:
                return

    def trial(self, name: str, trial_id: str) -> dict[str, Any]:
        """One trial."""
        return self._get(f"/runs/{quote(name)}/trials/{quote(trial_id)}")

    def compare(
        self, a: str, b: str, *, x: str | None = None, y: str | None = None
    ) -> dict[str, Any]:
        """Two fronts side by side."""
        return self._get("/compare", a=a, b=b, x=x, y=y)

    def check(self, config: str, assignments: Sequence[str] = ()) -> dict[str, Any]:
        """Checks a config (YAML); its `check_id` starts it."""
        body = {"config": config, "set": list(assignments)}
        return self._post("/checks", body, timeout_s=600)

    def start(self, check_id: str) -> dict[str, Any]:
        """Starts what was checked."""
        return self._post("/runs", {"check_id": check_id})

    def stop(self, name: str) -> str:
        """Asks a search to end as Ctrl-C does; says what was done."""
        return str(self._post(f"/runs/{quote(name)}/stop", timeout_s=200)["detail"])

    def resume(self, name: str) -> str:
        """Goes on with an interrupted run."""
        return str(self._post(f"/runs/{quote(name)}/resume")["detail"])

    def extend(self, name: str, trials: int) -> str:
        """Adds trials to a run and starts it."""
        return str(self._post(f"/runs/{quote(name)}/extend", {"trials": trials})["detail"])

    def log(self, name: str) -> str:
        """The end of what a search that the service started has said."""
        return str(self._get(f"/runs/{quote(name)}/log")["text"])

    def options(self) -> dict[str, dict[str, str]]:
        """What a config may name."""
        return self._get("/options")

    def export(self, name: str, trial_id: str, format: str = "safetensors") -> dict[str, Any]:
        """Exports a front member on the service's side; `download` fetches it."""
        path = f"/runs/{quote(name)}/trials/{quote(trial_id)}/export"
        return self._post(path, {"format": format}, timeout_s=2000)

    def download(self, export: Mapping[str, Any], path: str | Path) -> Path:
        """Writes the archive of an export to a file that must not exist yet."""
        return self._save(f"/exports/{quote(str(export['export_id']))}.zip", path)

    def report(self, name: str, path: str | Path) -> Path:
        """Writes the report of a run to a file that must not exist yet."""
        return self._save(f"/runs/{quote(name)}/report", path)

    def events(self, name: str, after: str | None = None) -> Iterator[Event]:
        """The run's events from a cursor on, until the service ends the stream."""
        query = f"?{urlencode({'after': after})}" if after else ""
        with self._open(f"/runs/{quote(name)}/events{query}") as answer:
            yield from _events(answer)

    def _save(self, address: str, path: str | Path) -> Path:
        path = Path(path)
        with self._open(address) as answer, path.open("xb") as file:
            shutil.copyfileobj(answer, file)
        return path

    def _get(self, path: str, **query: Any) -> dict[str, Any]:
        given = {key: value for key, value in query.items() if value is not None}
        with self._open(f"{path}?{urlencode(given, doseq=True)}") as answer:
            return _object(answer)

    def _post(
        self, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        with self._open(path, json.dumps(body or {}).encode(), timeout_s) as answer:
            return _object(answer)

    def _open(self, path: str, body: bytes | None = None, timeout_s: float | None = None) -> Any:
        headers = self._headers | ({"Content-Type": "application/json"} if body else {})
        request = urllib.request.Request(self._base + path, data=body, headers=headers)
        try:
            return self._opener.open(request, timeout=timeout_s or self._timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise ServeError(error.code, _detail(error)) from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise ServeError(
                0,
                f"`url` (={self._base}) must be that of a running service: {reason}. Start one "
                "with `prune-search serve`.",
            ) from None


def _object(answer: BinaryIO) -> dict[str, Any]:
    found: dict[str, Any] = json.load(answer)
    return found


def _detail(error: urllib.error.HTTPError) -> str:
    """The message of a problem document; the status line of anything else."""
    try:
        return str(json.load(error)["detail"])
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"


def _events(lines: BinaryIO) -> Iterator[Event]:
    fields: dict[str, str] = {}
    for line in lines:
        text = line.decode().rstrip("\n")
        if text and not text.startswith(":"):
            name, _, value = text.partition(": ")
            fields[name] = value
        elif fields and not text:
            yield Event(fields["event"], json.loads(fields["data"]), fields.get("id"))
            fields = {}
