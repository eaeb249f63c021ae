"""Errors as problem documents (RFC 9457), in the words of the command line."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from ..config_errors import rule_of
from ..yaml_source import ConfigError, printable, show

MEDIA_TYPE = "application/problem+json"
FAILED = "The service failed at this request. Its own log says why."
log = logging.getLogger("prunesearch.serve")


class ProblemError(Exception):
    """A request that is refused; `str(error)` is the whole message."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        """Says why.

        Args:
            status: The HTTP status.
            detail: `field` (=value) must <rule>: <reason>. <Fix>.
            headers: Further headers of the answer.
        """
        super().__init__(detail)
        self.status = status
        self.headers = dict(headers or {})


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a request that is refused."""
    document = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": printable(detail),
    }
    return JSONResponse(document, status, headers, media_type=MEDIA_TYPE)


def add_handlers(app: FastAPI) -> None:
    """Turns every error of `app` into a problem document."""
    app.add_exception_handler(ProblemError, _refused)
    app.add_exception_handler(ConfigError, _wrong_input)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _failed)


def unexpected(request_line: str) -> Response:
    """The answer when the service itself failed; the cause goes to its log, not to the client."""
    log.exception("`%s` failed", request_line)
    return problem(500, FAILED)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)
    return problem(error.status, str(error), error.headers)


async def _wrong_input(request: Request, error: Exception) -> Response:
    return problem(422, str(error))


async def _failed(request: Request, error: Exception) -> Response:
    return problem(500, FAILED)  # the error goes on to whoever logs it


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    texts = {
        404: f"`path` (={request.url.path}) must be one of the service's: there is none. "
        "See /api/v1/openapi.json.",
        405: f"`method` (={request.method}) must be one that {request.url.path} knows. "
        "See /api/v1/openapi.json.",
    }
    detail = texts.get(error.status_code, str(error.detail))
    return problem(error.status_code, detail, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return problem(422, "\n".join(_mistake(one) for one in error.errors()))


def _mistake(one: Mapping[str, Any]) -> str:
    """One of pydantic's mistakes in this project's words."""
    kind, context = one["type"], one.get("ctx", {})
    place = ".".join(str(part) for part in one["loc"][1:]) or str(one["loc"][0])
    if kind == "missing":
        return f"`{place}` must be given: it has no default. Add it."
    if kind == "extra_forbidden":
        return (
            f"`{place}` (={show(one['input'])}) must be left out: there is no such key. Delete it."
        )
    if kind == "json_invalid":
        return f"`body` must be JSON: {context.get('error', 'it cannot be parsed')}. Correct it."
    rule = rule_of(kind, {**context, "choices": context.get("expected", "")})
    return f"`{place}` (={show(one['input'])}) must {rule}. Correct it."
