"""The service as an ASGI application: the API, the pages and their assets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from .api import PREFIX, TAGS, Service, make_router, problem_schema
from .models import RunName, TrialId
from .problems import add_handlers
from .security import Guard
from .settings import Settings

STATIC = Path(__file__).with_name("static")
DESCRIPTION = (
    "Runs of prune-search: how far they are, their Pareto fronts, live events, and searches that "
    "are checked, started, stopped, extended and exported. Errors are problem documents (RFC "
    "9457). Where the service has a token, send it as `Authorization: Bearer TOKEN`."
)


class App:
    """The guarded application.

    Attributes:
        settings: What it was made with.
        service: What its requests share.
        api: The application inside.
    """

    def __init__(self, settings: Settings) -> None:
        """Reads nothing yet."""
        self.settings = settings
        self.service = Service(settings)
        self.api = _make(self.service)
        self._guard = Guard(self.api, settings)
        self.api.state.guard = self._guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes a request."""
        await self._guard(scope, receive, send)

    def end(self) -> None:
        """Ends what would keep a server from ending."""
        self.service.watches.close()
        self.service.launcher.end()


def create_app(settings: Settings) -> App:
    """The service.

    Args:
        settings: What it serves, and to whom.
    """
    return App(settings)


def _make(service: Service) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.launcher.close)

    api = FastAPI(
        title="prune-search",
        version=version("prune-search"),
        description=DESCRIPTION,
        openapi_url=f"{PREFIX}/openapi.json",
        openapi_tags=list(TAGS),
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        separate_input_output_schemas=False,
    )
    api.include_router(make_router(service))
    api.mount("/static", StaticFiles(directory=STATIC), name="static")
    _add_pages(api)
    add_handlers(api)
    generate = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            api.openapi_schema = problem_schema(generate())
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's manual says
    return api


def _add_pages(api: FastAPI) -> None:
    """Each page is the same document; its script reads the address."""

    def page() -> FileResponse:
        return FileResponse(STATIC / "page.html")

    def run_page(name: RunName) -> FileResponse:
        return page()

    def trial_page(name: RunName, trial_id: TrialId) -> FileResponse:
        return page()

    def login() -> FileResponse:
        return FileResponse(STATIC / "login.html")

    def icon() -> FileResponse:
        return FileResponse(STATIC / "icon.svg")

    pages = {"/": page, "/new": page, "/compare": page, "/login": login, "/favicon.ico": icon}
    for path, answer in pages.items():
        api.get(path, include_in_schema=False)(answer)
    api.get("/runs/{name}", include_in_schema=False)(run_page)
    api.get("/runs/{name}/trials/{trial_id}", include_in_schema=False)(trial_page)
