"""The connection to a Ray cluster's job server, and what goes wrong with it, in plain words."""

from __future__ import annotations

import logging
import os
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .yaml_source import ConfigError

TIMEOUT_S = (10, 120)  # to connect, and between two pieces of an answer
LOGGERS = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")


class JobsError(RuntimeError):
    """The cluster did not answer, or not as it should; `str(error)` is the whole message."""


def check_address(address: str) -> None:
    """Refuses what is no address of a job server, before anything is done."""
    if re.fullmatch(r"https?://[^/?#\s]+/?", address) is None:
        raise ConfigError(
            f"`--address` (={address}) must be the cluster's job server: http://HEAD:8265 as a "
            "rule. Write it so; auto and HOST:PORT are for `run` on a node of the cluster."
        )


def connect(address: str) -> Any:
    """A `ray.job_submission.JobSubmissionClient` that gives up on a host that is gone.

    Args:
        address: `http://HEAD:8265`.

    Raises:
        ConfigError: If no job server answers there, or it refuses this machine's token.
    """
    check_address(address)
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]  # Ray has no types
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=TIMEOUT_S, **options)

    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    token = _token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        # Ray lets these variables win over the address that it is given
        with _unset("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            return Client(address.rstrip("/"), headers=headers)
    except failures() as error:
        refuse_token(error, address)
        raise ConfigError(
            f"`--address` (={address}) must be the job server of a running Ray cluster: "
            f"{last_line(error)}. Check the address, and the tunnel or port-forward to it."
        ) from error


def is_open(address: str) -> bool:
    """Whether the job server answers without a token: whoever reaches it can run code there."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/jobs/", timeout=TIMEOUT_S[0]):
            return True
    except OSError:
        return False


@contextmanager
def talking(address: str) -> Iterator[None]:
    """Turns every way in which a request fails into one message.

    Raises:
        JobsError: If the cluster did not do what the block asked of it.
        ConfigError: If it refuses this machine's token.
    """
    try:
        yield
    except JobsError:
        raise
    except failures() as error:
        refuse_token(error, address)
        raise JobsError(f"{address} did not do what it was asked: {last_line(error)}") from error


def failures() -> tuple[type[Exception], ...]:
    """What Ray's client raises when the connection or the server fails."""
    import aiohttp
    from ray.exceptions import RayError

    # requests raises OSErrors; what is no answer of a job server gives a ValueError or KeyError
    return OSError, RuntimeError, ValueError, KeyError, aiohttp.ClientError, RayError


def refuse_token(error: Exception, address: str) -> None:
    """Raises if the server wants another token."""
    from ray.exceptions import AuthenticationError

    if isinstance(error, AuthenticationError) or getattr(error, "status", None) in (401, 403):
        known = "this machine's is another one" if _token() else "this machine has none"
        raise ConfigError(
            f"`--address` (={address}) must be given the cluster's token: {known}. Put it into "
            "~/.ray/auth_token (mode 0600) or into RAY_AUTH_TOKEN."
        ) from None


def last_line(error: Exception) -> str:
    """The last line of an error: Ray sends whole tracebacks."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip().rstrip(".")[:300]


def _token() -> str | None:
    """This machine's token, from where Ray looks for it."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "disabled":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None


@contextmanager
def _unset(*names: str) -> Iterator[None]:
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
