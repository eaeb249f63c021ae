"""What a service was started with."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """Bounds that keep one client from taking the service away from the others.

    Attributes:
        reads_per_s: Requests a second of one client address, in the long run.
        reads_at_once: And at a time.
        writes_per_s: The same for requests that change something.
        writes_at_once: And at a time.
        logins_per_s: The same for wrong tokens.
        logins_at_once: And at a time.
        body_bytes: The largest request.
        streams: Open event streams in all.
    """

    reads_per_s: float = 500.0
    reads_at_once: int = 2000
    writes_per_s: float = 1.0
    writes_at_once: int = 30
    logins_per_s: float = 0.1
    logins_at_once: int = 5
    body_bytes: int = 256 * 1024
    streams: int = 64


@dataclass(frozen=True)
class Settings:
    """What a service was started with.

    Attributes:
        results: The folder of runs, absolute, without links.
        host: The address that it listens on.
        port: And the port.
        token: What a client must know; None where nothing is asked (loopback only).
        job_server: The Ray cluster that searches are sent to; None runs them on this machine.
        allow_code: Whether a config may name `module:callable`.
        hosts: Further names under which the service is reached.
        max_searches: How many searches it runs at a time on this machine.
        limits: Bounds.
    """

    results: Path
    host: str = "127.0.0.1"
    port: int = 8090
    token: str | None = None
    job_server: str | None = None
    allow_code: bool = False
    hosts: tuple[str, ...] = ()
    max_searches: int = 1
    limits: Limits = field(default_factory=Limits)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, unreachable from others."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
