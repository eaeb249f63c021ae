"""Who may ask what: host, origin, token, rates and sizes, checked before a request is read."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .problems import ProblemError, problem, unexpected
from .settings import Settings

SESSION_S = 12 * 3600
BODY_WITHIN_S = 30.0
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
PUBLIC = ("/login", "/favicon.ico", "/api/v1/session")
PUBLIC_FOLDER = "/static/"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with `no-referrer` browsers send `Origin: null`
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}

Clock = Callable[[], float]


class Sessions:
    """Tokens and the cookies that stand for them; nothing is kept, a cookie proves itself."""

    def __init__(self, token: str, port: int, now: Clock = time.time) -> None:
        self._token = token.encode()
        self._key = hashlib.sha256(b"prune-search session " + self._token).digest()
        self._now = now
        self.cookie = f"prune_search_{port}"  # cookies do not know ports

    def knows(self, token: str) -> bool:
        """Whether it is the token, in constant time."""
        return hmac.compare_digest(token.encode(), self._token)

    def new(self) -> str:
        """A cookie that is valid for `SESSION_S`."""
        until = str(int(self._now()) + SESSION_S)
        return f"{until}.{self._sign(until)}"

    def valid(self, cookie: str) -> bool:
        """Whether this token's owner got the cookie, and it has not expired."""
        until, _, signature = cookie.partition(".")
        mine = hmac.compare_digest(self._sign(until).encode(), signature.encode())
        return mine and until.isdigit() and int(until) > self._now()

    def _sign(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()


class Buckets:
    """Token buckets by client address; the least recent are forgotten."""

    MOST = 4096

    def __init__(self, per_s: float, at_once: int, now: Clock = time.monotonic) -> None:
        self._per_s, self._at_once, self._now = per_s, at_once, now
        self._known: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> float:
        """Takes one; seconds until there is one again, 0.0 if there was."""
        now = self._now()
        left, then = self._known.pop(client, (float(self._at_once), now))
        left = min(self._at_once, left + (now - then) * self._per_s)
        wait = 0.0 if left >= 1 else (1 - left) / self._per_s
        self._known[client] = (left if wait else left - 1, now)
        if len(self._known) > self.MOST:
            self._known.popitem(last=False)
        return wait


class Guard:
    """The outermost application: refuses what must not get in, and marks what goes out."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._names = _names(settings)
        limits = settings.limits
        self._reads = Buckets(limits.reads_per_s, limits.reads_at_once)
        self._writes = Buckets(limits.writes_per_s, limits.writes_at_once)
        self._logins = Buckets(limits.logins_per_s, limits.logins_at_once)
        self.sessions = Sessions(settings.token, settings.port) if settings.token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes a request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        started = False

        async def marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                _mark(message, scope["path"])
            await send(message)

        try:
            headers = Headers(scope=scope)
            refusal = self._refusal(scope, headers)
            if refusal is None and scope["method"] not in SAFE_METHODS:
                receive = await self._limited(receive, headers.get("content-length", ""))
        except ProblemError as error:
            refusal = problem(error.status, str(error), error.headers)
        try:
            await (refusal or self._app)(scope, receive, marked)
        except Exception:
            answer = unexpected(f"{scope['method']} {scope['path']}")
            if not started:
                await answer(scope, receive, marked)

    def log_in(self, scope: Scope, token: str) -> str:
        """A cookie for whoever knows the token.

        Raises:
            ProblemError: If it is another one, or was tried too often.
        """
        if self.sessions is None:
            raise ProblemError(409, "`token` must be left out: this service asks for none.")
        if not self._knows(scope, token):
            raise _wrong_token()
        return self.sessions.new()

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to a request that does not get in; None where it does.

        Raises:
            ProblemError: The same.
        """
        is_write = scope["method"] not in SAFE_METHODS
        self._check_host(headers)
        self._check_origin(scope, headers, is_write)
        self._check_rate(self._writes if is_write else self._reads, scope)
        if self.sessions is None or _is_public(scope["path"]):
            return None
        if self._is_known(scope, headers):
            return None
        if _is_api(scope["path"]):
            raise _wrong_token()
        query = scope["query_string"].decode("latin-1")
        wanted = scope["path"] + (f"?{query}" if query else "")
        return RedirectResponse(f"/login?next={quote(wanted, safe='')}", 303)

    def _check_host(self, headers: Headers) -> None:
        """Refuses names that a foreign page's domain was bound to (DNS rebinding)."""
        given = headers.get("host", "")
        name = _hostname(given)
        if name in self._names:
            return
        if not self._settings.is_loopback and _is_address(name):
            return  # only names can be bound anew
        raise ProblemError(
            403,
            f"`Host` (={given}) must be a name of this service. Reach it as "
            f"{self._settings.host}, or start it with --allow-host {name or 'NAME'}.",
        )

    def _check_origin(self, scope: Scope, headers: Headers, is_write: bool) -> None:
        """Refuses what another site's page asks for in the name of whoever looks at it."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        foreign = site not in ("same-origin", "none")
        if origin is not None:
            foreign |= urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
        if foreign and (is_write or _is_api(scope["path"])):
            raise ProblemError(
                403,
                f"`Origin` (={origin}) must be the service's own: another site may not use it. "
                "Open the service's own page.",
            )

    def _check_rate(self, buckets: Buckets, scope: Scope) -> None:
        wait_s = buckets.take(_client(scope))
        if wait_s:
            raise ProblemError(
                429,
                f"`rate` must be lower: too many requests from {_client(scope)}. Wait "
                f"{wait_s:.1f} s.",
                {"Retry-After": str(int(wait_s) + 1)},
            )

    def _is_known(self, scope: Scope, headers: Headers) -> bool:
        assert self.sessions is not None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self._knows(scope, token.strip())
        cookies = cookie_parser(headers.get("cookie", ""))
        return self.sessions.valid(cookies.get(self.sessions.cookie, ""))

    def _knows(self, scope: Scope, token: str) -> bool:
        assert self.sessions is not None
        if self.sessions.knows(token):
            return True
        self._check_rate(self._logins, scope)
        return False

    async def _limited(self, receive: Receive, announced: str) -> Receive:
        """Reads the body; whoever reads it again gets it from memory.

        Args:
            receive: Where it comes from.
            announced: The request's Content-Length: what is too large need not arrive.
        """
        most, body = self._settings.limits.body_bytes, b""
        too_large = ProblemError(
            413,
            f"`body` must be at most {most // 1024} KiB: it is larger. Shorten it.",
            {"Connection": "close"},
        )
        if announced.isdecimal() and int(announced) > most:
            raise too_large
        try:
            async with asyncio.timeout(BODY_WITHIN_S):
                more = True
                while more:
                    message = await receive()
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise ProblemError(
                408, "`body` must arrive within 30 s: it did not. Send it again."
            ) from None
        pieces = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return pieces.pop() if pieces else await receive()

        return again


def _mark(message: Message, path: str) -> None:
    headers = MutableHeaders(scope=message)
    for name, value in HEADERS.items():
        headers.setdefault(name, value)
    cached = path.startswith(PUBLIC_FOLDER)
    headers.setdefault("Cache-Control", "no-cache" if cached else "no-store")


def _names(settings: Settings) -> frozenset[str]:
    own = {"localhost", "127.0.0.1", "::1"} if settings.is_loopback else {socket.gethostname()}
    return frozenset(name.lower() for name in {settings.host, *own, *settings.hosts})


def _hostname(host: str) -> str:
    """The name in `name:port` or `[address]:port`."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower().removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_api(path: str) -> bool:
    return path.startswith("/api/")


def _is_public(path: str) -> bool:
    return path in PUBLIC or path.startswith(PUBLIC_FOLDER)


def _client(scope: Scope) -> str:
    return scope["client"][0] if scope.get("client") else "unknown"


def _wrong_token() -> ProblemError:
    return ProblemError(
        401,
        "`token` must be the service's own: there is none here, or another one. Send it as "
        "`Authorization: Bearer TOKEN`, or log in at /login.",
        {"WWW-Authenticate": "Bearer"},
    )
