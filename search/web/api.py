"""The REST API under /api/v1."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from threading import Lock
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from starlette.responses import HTMLResponse, StreamingResponse

from ..config import dump_config
from ..runs import Run
from ..yaml_source import ConfigError
from . import views
from .archive import files_of, zipped
from .folders import run_folder, run_folders
from .launch import Launcher
from .ledger import Ledger, Ledgers, Snapshot
from .models import (
    Check,
    CheckRequest,
    Comparison,
    Done,
    Export,
    ExportRequest,
    ExtendRequest,
    Front,
    Health,
    Log,
    Login,
    Problem,
    RunDetail,
    RunList,
    RunName,
    RunSummary,
    StartRequest,
    Status,
    TrialDetail,
    TrialId,
    TrialPage,
)
from .problems import MEDIA_TYPE, ProblemError
from .security import Guard
from .settings import Settings
from .watch import MEDIA_TYPE as EVENTS
from .watch import EventStream, Watches

PREFIX = "/api/v1"
Metric = Annotated[str | None, Query(max_length=60, examples=["latency_ms"])]
_PROBLEMS = {
    400: "The request is malformed",
    401: "The token is missing or wrong",
    403: "Another site asks, or the service does not allow this",
    404: "There is no such thing",
    408: "The body did not arrive",
    409: "The state of the run does not allow this",
    413: "The body is too large",
    422: "A value is wrong",
    429: "Too many requests",
    500: "The service failed",
    503: "Too much at a time",
    504: "A command took too long",
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": f"{text}.",
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for status, text in _PROBLEMS.items()
}


class Service:
    """What the requests share.

    Attributes:
        settings: What the service was started with.
        ledgers: The runs.
        watches: Those who follow one.
        launcher: Searches and exports.
    """

    def __init__(self, settings: Settings) -> None:
        """Reads nothing yet."""
        self.settings = settings
        self.ledgers = Ledgers()
        self.watches = Watches(settings.limits.streams)
        self.launcher = Launcher(settings)
        self._reporting = Lock()

    def ledger(self, name: str) -> Ledger:
        """A run's ledger.

        Raises:
            ProblemError: If there is no such run.
        """
        return self.ledgers.of(run_folder(self.settings.results, name))

    def snapshot(self, name: str) -> Snapshot:
        """A run as it is now.

        Raises:
            ProblemError: If there is none, or it cannot be read.
        """
        try:
            return self.ledger(name).snapshot()
        except (ConfigError, OSError) as error:
            raise ProblemError(409, f"`run` (={name}) cannot be read: {error}") from error

    def report(self, name: str) -> str:
        """A run as one HTML page; one is made at a time, for it takes memory.

        Raises:
            ProblemError: If there is no such run.
        """
        from ..report import render, report_data  # torch: seconds that others need not wait

        folder = run_folder(self.settings.results, name)
        with self._reporting:
            return render(report_data(Run(folder)))

    def summaries(self) -> list[RunSummary]:
        """All runs, those that were only just started too."""
        launches = self.launcher.launches()
        found = {}
        for folder in run_folders(self.settings.results):
            try:
                found[folder.name] = self.ledgers.of(folder).snapshot().summary
            except (ConfigError, OSError) as error:
                text = str(error)
                found[folder.name] = RunSummary(name=folder.name, state="unreadable", message=text)
        for name, launch in launches.items():
            found[name] = views.launched(found.get(name), name, launch)
        return sorted(found.values(), key=lambda run: -(run.updated_at or run.started_at or 1e12))


def make_router(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter(prefix=PREFIX, responses=PROBLEMS)
    _add_session(router)
    _add_runs(router, service)
    _add_trials(router, service)
    _add_searches(router, service)
    _add_exports(router, service)
    return router


def _add_session(router: APIRouter) -> None:
    @router.post("/session", status_code=204, summary="Log in with a cookie", tags=["session"])
    def log_in(login: Login, request: Request, response: Response) -> None:
        """For browsers. Other clients send `Authorization: Bearer TOKEN` with each request."""
        guard: Guard = request.app.state.guard
        cookie = guard.log_in(request.scope, login.token)
        assert guard.sessions is not None
        response.set_cookie(
            guard.sessions.cookie,
            cookie,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
            path="/",
        )

    @router.delete("/session", status_code=204, summary="Log out", tags=["session"])
    def log_out(request: Request, response: Response) -> None:
        """Deletes the cookie."""
        sessions = request.app.state.guard.sessions
        if sessions is not None:
            response.delete_cookie(sessions.cookie, path="/", httponly=True, samesite="strict")


def _add_runs(router: APIRouter, service: Service) -> None:
    @router.get("/health", summary="Whether the service is there", tags=["session"])
    def health() -> Health:
        """Its version, and what it may do."""
        settings = service.settings
        return Health(
            version=version("prune-search"),
            asks_token=settings.token is not None,
            runs_code=settings.allow_code,
            job_server=settings.job_server,
        )

    @router.get("/runs", summary="List the runs", tags=["runs"])
    def list_runs() -> RunList:
        """The run folders directly in the results folder, the latest first."""
        return RunList(folder=service.settings.results.name, runs=service.summaries())

    @router.get("/runs/{name}", summary="One run", tags=["runs"])
    def get_run(name: RunName) -> RunDetail:
        """How far it is, its config, its dense model and why trials failed."""
        snapshot = service.snapshot(name)
        folder = run_folder(service.settings.results, name)
        detail = views.run_detail(snapshot, folder)
        return views.with_launch(detail, service.launcher.launches().get(name))

    @router.get("/runs/{name}/front", summary="The Pareto front", tags=["runs"])
    def get_front(name: RunName, x: Metric = None, y: Metric = None) -> Front:
        """The non-dominated completed trials in two metrics, by default the objectives."""
        return views.front(service.snapshot(name), x, y)

    @router.get(
        "/runs/{name}/events",
        status_code=200,
        summary="Follow a run",
        tags=["runs"],
        response_class=EventStream,
        responses={
            200: {
                "content": {EVENTS: {"schema": {"type": "string"}}},
                "description": "Server-sent events: `start` (the columns of points; forget what "
                "you know), `trials` (points that are new or changed), `progress` (the run's "
                "summary, hypervolume and failures), `gone` (the run can no longer be read).",
            }
        },
    )
    async def follow(
        name: RunName,
        after: Annotated[
            str | None, Query(max_length=40, description="the `id` of the last event seen")
        ] = None,
        last_event_id: Annotated[str | None, Header(max_length=40)] = None,
    ) -> EventStream:
        """A stream that does not end. `id` of each event is a cursor."""
        ledger = service.ledger(name)
        service.watches.admit()
        return EventStream(service.watches, ledger, last_event_id or after)

    @router.get(
        "/runs/{name}/report",
        summary="Download the report",
        tags=["runs"],
        response_class=HTMLResponse,
        responses={200: {"description": "The page."}},
    )
    def report(name: RunName) -> HTMLResponse:
        """One HTML file that needs no network, as `prune-search report` writes it."""
        service.snapshot(name)  # refuses what cannot be read
        page = service.report(name)
        file = f'attachment; filename="{name}-report.html"'
        return HTMLResponse(page, headers={"Content-Disposition": file})

    @router.get("/compare", summary="Compare two runs", tags=["runs"])
    def compare(
        a: Annotated[str, Query(max_length=100)],
        b: Annotated[str, Query(max_length=100)],
        x: Metric = None,
        y: Metric = None,
    ) -> Comparison:
        """Both fronts in the same two metrics, hypervolumes by one reference point."""
        return views.comparison({name: service.snapshot(name) for name in (a, b)}, a, b, x, y)


def _add_trials(router: APIRouter, service: Service) -> None:
    @router.get("/runs/{name}/trials", summary="List trials", tags=["trials"])
    def list_trials(
        name: RunName,
        status: Annotated[list[Status] | None, Query(description="only these")] = None,
        sort: Annotated[
            str, Query(max_length=60, description="a metric, or another column")
        ] = "trial_id",
        order: Literal["asc", "desc"] = "asc",
        offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
        limit: Annotated[int, Query(ge=1, le=500)] = 50,
    ) -> TrialPage:
        """A page of the run's trials; those without a value come last."""
        snapshot = service.snapshot(name)
        return views.trial_page(snapshot, status, sort, order == "desc", offset, limit)

    @router.get("/runs/{name}/trials/{trial_id}", summary="One trial", tags=["trials"])
    def get_trial(name: RunName, trial_id: TrialId) -> TrialDetail:
        """The whole candidate, what was measured, widths, times and messages."""
        return views.trial_detail(service.snapshot(name), name, trial_id)


def _add_searches(router: APIRouter, service: Service) -> None:
    launcher = service.launcher

    @router.post("/checks", status_code=201, summary="Check a config", tags=["searches"])
    def check(request: CheckRequest) -> Check:
        """What can be removed, what cannot and why. Nothing is started."""
        checked = launcher.check(request.config, request.set)
        return Check(
            check_id=checked.check_id,
            name=checked.config.name,
            trials=checked.config.search.trials,
            report=checked.report,
            config=dump_config(checked.config),
        )

    @router.post("/runs", status_code=201, summary="Start a checked search", tags=["searches"])
    def start(request: StartRequest) -> RunSummary:
        """Exactly what was checked is started: as a process, or as a Ray job."""
        name = launcher.start(request.check_id)
        return views.launched(None, name, launcher.launches()[name])

    @router.post("/runs/{name}/stop", status_code=202, summary="Stop a search", tags=["searches"])
    def stop(name: RunName) -> Done:
        """As Ctrl-C: running trials end first. The second time at once."""
        folder = service.settings.results / name
        if name not in launcher.launches():
            folder = run_folder(service.settings.results, name)
        return Done(detail=launcher.stop(folder))

    @router.post("/runs/{name}/resume", status_code=202, summary="Resume", tags=["searches"])
    def resume(name: RunName) -> Done:
        """Finishes an interrupted run."""
        snapshot = _idle(service, name)
        if snapshot.summary.state == "finished":
            raise ProblemError(
                409, f"`run` (={name}) must be unfinished: it is finished. Extend it instead."
            )
        launcher.go_on(run_folder(service.settings.results, name), snapshot.config)
        return Done(detail=f"{name} goes on.")

    @router.post("/runs/{name}/extend", status_code=202, summary="Add trials", tags=["searches"])
    def extend(name: RunName, request: ExtendRequest) -> Done:
        """Adds trials to a run and starts it."""
        snapshot = _idle(service, name)
        folder = run_folder(service.settings.results, name)
        launcher.go_on(folder, snapshot.config, more=request.trials)
        return Done(detail=f"{name} goes on with {request.trials} more trials.")

    @router.get("/runs/{name}/log", summary="What a search said", tags=["searches"])
    def log(name: RunName) -> Log:
        """The end of the log of a search that this service has started."""
        return Log(text=launcher.log(name))

    @router.get("/options", summary="What a config may name", tags=["searches"])
    def options() -> dict[str, dict[str, str]]:
        """Models, data sets and methods with a line each."""
        return launcher.options()


def _add_exports(router: APIRouter, service: Service) -> None:
    launcher = service.launcher

    @router.post(
        "/runs/{name}/trials/{trial_id}/export",
        status_code=201,
        summary="Export a member",
        tags=["exports"],
    )
    def export(name: RunName, trial_id: TrialId, request: ExportRequest) -> Export:
        """Writes it, proves it by reloading, and tests it once on the test split."""
        snapshot = service.snapshot(name)
        views.row_of(snapshot, name, trial_id)
        folder = run_folder(service.settings.results, name)
        made = launcher.export(folder, snapshot.config, trial_id, request.format)
        sizes = {
            path.relative_to(made.folder).as_posix(): path.stat().st_size
            for path in files_of(made.folder)
        }
        return Export(
            export_id=made.export_id,
            run=name,
            trial_id=trial_id,
            summary=made.summary,
            files=sizes,
            url=f"{PREFIX}/exports/{made.export_id}.zip",
        )

    @router.get(
        "/exports/{export_id}.zip",
        summary="Download an export",
        tags=["exports"],
        response_class=StreamingResponse,
        responses={
            200: {
                "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}},
                "description": "The archive.",
            }
        },
    )
    def download(export_id: str) -> StreamingResponse:
        """One zip archive, streamed."""
        folder = launcher.exported(export_id).folder
        return StreamingResponse(
            zipped(folder),
            media_type="application/zip",
            headers={"Content-Disposition": f'attachment; filename="{folder.name}.zip"'},
        )


def _idle(service: Service, name: str) -> Snapshot:
    snapshot = service.snapshot(name)
    if snapshot.summary.state == "running":
        raise ProblemError(409, f"`run` (={name}) must not be running: it is. Stop it first.")
    return snapshot


def problem_schema(document: dict[str, Any]) -> dict[str, Any]:
    """Adds the error model, which no route returns by itself, to an OpenAPI document."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas["Problem"] = Problem.model_json_schema()
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    return document


TAGS: Sequence[dict[str, str]] = (
    {"name": "runs", "description": "How far runs are, their fronts, live and compared."},
    {"name": "trials", "description": "What was tried."},
    {"name": "searches", "description": "Check, start, stop, resume and extend searches."},
    {"name": "exports", "description": "Take a front member away."},
    {"name": "session", "description": "The service itself."},
)
