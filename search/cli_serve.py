"""`prune-search serve`: the live page and the REST API."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_common import complain, out
from .yaml_source import ConfigError

if TYPE_CHECKING:
    from .web.settings import Settings

SHORTEST_TOKEN = 16
MOST_CONNECTIONS = 1000


def serve(
    results_dir: Annotated[Path, typer.Argument(metavar="[RESULTS_DIR]")] = Path("results"),
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8090,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Ask for the token in this file; needed beyond loopback."
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="http://HEAD:8265", help="Start searches as Ray jobs there, not here."
        ),
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Also start configs that name module:callable.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A further name of this service; repeatable."),
    ] = None,
    max_searches: Annotated[
        int, typer.Option(min=1, help="The most searches at a time on this machine.")
    ] = 1,
) -> None:
    """Show the runs of a folder live in a browser, and serve them as a REST API.

    Ctrl-C ends the service. Searches that it has started go on.
    """
    _check_installed()
    from .job_server import check_address
    from .web.settings import Settings, is_loopback

    if not results_dir.is_dir():
        raise ConfigError(
            f"`RESULTS_DIR` (={results_dir}) must be a folder on this machine: there is none. "
            "Create it, or name the folder that holds the runs."
        )
    if not is_loopback(host) and token_file is None:
        raise ConfigError(
            f"`--host` (={host}) must be 127.0.0.1 without a token: others could start searches "
            "here. Write a token of 16 or more characters into a file that only you can read, "
            "and name it with --token-file."
        )
    if address is not None:
        check_address(address)
    with _listening(host, port) as listener:
        settings = Settings(
            results=results_dir.resolve(),
            host=host,
            port=listener.getsockname()[1],
            token=None if token_file is None else _token(token_file),
            job_server=address,
            allow_code=allow_code,
            hosts=tuple(allow_host or ()),
            max_searches=max_searches,
        )
        _run(settings, listener, str(results_dir))


def _run(settings: Settings, listener: socket.socket, shown: str) -> None:
    from .web.app import create_app
    from .web.server import Server

    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    server = Server(create_app(settings), MOST_CONNECTIONS)
    out.print(
        f"serving {shown} at http://{host}:{settings.port} (Ctrl-C ends the service, not its "
        "searches)",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        running = server.searches
        left = f" {', '.join(running)} goes on: `prune-search stop`." if running else ""
        complain(f"The service has ended.{left}")


def _check_installed() -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"`serve` must find {error.name}: it is not installed. Install the extra: "
            "pip install 'prune-search[serve]'."
        ) from None


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        ConfigError: If that is not possible.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(
            f"`--host` (={host}) must be an address of this machine: {error}. Correct it."
        ) from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(place)
        listener.listen(MOST_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"`--port` (={port}) must be free on {host}: {error.strerror}. Choose another; "
            "0 takes any."
        ) from None
    return listener


def _token(path: Path) -> str:
    """The token in a file.

    Raises:
        ConfigError: If there is none, or too short a one.
    """
    try:
        token = path.read_text(encoding="utf-8").strip()
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"`--token-file` (={path}) must be a file with a token: {error}. Correct the path."
        ) from None
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
        raise ConfigError(
            f"`--token-file` (={path}) must hold a token of at least {SHORTEST_TOKEN} printable "
            "ASCII characters: short ones can be guessed. Make one with `openssl rand -hex 32`."
        )
    if mode & 0o077:
        complain(f"warning: other users can read the token in {path}. chmod 600 it.")
    return token
