"""The API against its own OpenAPI document: whatever is asked, it answers as it says."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from web import make_run

from prunesearch.search.web.app import create_app
from prunesearch.search.web.settings import Limits, Settings

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
RUN = "known"
FEW = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@functools.cache
def results(folder: Path) -> Path:
    make_run(folder, RUN, 20)
    return folder


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Without the events, which do not end, and the options, which take a process."""
    unbounded = Limits(reads_at_once=10**9, writes_at_once=10**9, logins_at_once=10**9)
    app = create_app(
        Settings(
            results=results(tmp_path_factory.mktemp("results")),
            hosts=("testserver",),
            limits=unbounded,
        )
    )
    found = schemathesis.openapi.from_asgi("/api/v1/openapi.json", app)
    return found.exclude(path_regex="/(events|options)$")


def test_no_answer_is_a_surprise(api: Any) -> None:
    operations = [found.ok() for found in api.get_all_operations()]
    assert len(operations) > 15
    for operation in operations:

        @FEW
        @given(case=operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS)
            if case.method == "GET" and "name" in (case.path_parameters or {}):
                case.path_parameters["name"] = RUN  # of a run that is there
                if "trial_id" in case.path_parameters:
                    case.path_parameters["trial_id"] = "t00001"
                case.call_and_validate(checks=CHECKS)

        check()
