"""Ray's token: whoever knows it can run code on the cluster, so no other user may read it.

Ray would make the token's file by itself, readable by every user of the machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
from pathlib import Path

from .yaml_source import ConfigError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
ANSWER_S = 5.0
# A harmless request that needs the token wherever one is asked for.
_REQUEST = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"


def prepare_token() -> None:
    """Makes the token of a local Ray that is about to start, unless the user has one.

    The file `~/.ray/auth_token`, where Ray looks for it, is made with mode 0600. One that others
    could read is tightened, with a warning. A file that RAY_AUTH_TOKEN_PATH names is the user's:
    it is warned of and left alone.

    Raises:
        ConfigError: If the file cannot be made.
    """
    if not wants_token() or os.environ.get(TOKEN):
        return
    if chosen := os.environ.get(TOKEN_PATH):
        if _shared_mode(Path(chosen)):
            _warn(f"other users can read Ray's token in {chosen}. chmod 600 it.")
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        if not path.exists():
            _create(path)
        elif mode := _shared_mode(path):
            path.chmod(0o600)
            _warn(
                f"other users could read Ray's token in {path} (mode {mode:04o}); the mode is "
                "0600 now. Delete the file while no Ray runs, and a new token is made."
            )
    except OSError as error:
        raise ConfigError(
            f"`{path}` must be a file of yours, for Ray's token: {error.strerror}. Correct it, or "
            f"name another file in {TOKEN_PATH}."
        ) from error


def private_folder() -> Path:
    """Where a local Ray puts its sockets, logs and code: no other user can enter.

    Ray's own choice, /tmp/ray, is writable by everybody.

    Raises:
        ConfigError: If somebody else was there first.
    """
    base = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    folder = Path(base) / f"prune-search-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"`{folder}` must be a folder of yours that nobody else can enter: Ray puts its "
            "sockets there. Delete it, or name another place in RAY_TMPDIR."
        )
    return folder / "ray"  # Ray opens this one to everybody


def wants_token() -> bool:
    """Whether a Ray that is started here asks for a token: yes, unless the user says no."""
    return os.environ.get(MODE, "token").lower() == "token"


def warn_if_open(address: str) -> None:
    """Warns of a cluster that needs no token.

    Args:
        address: HOST:PORT of the head's control store (GCS).
    """
    if answers_anyone(address):
        _warn(
            f"the Ray cluster at {address} answers without a token: WHOEVER REACHES IT CAN RUN "
            f"CODE THERE. Start it with {MODE}=token and a token file that only you can read: "
            "`ray get-auth-token --generate`, then `chmod 600 ~/.ray/auth_token`."
        )


def answers_anyone(address: str) -> bool:
    """Whether the head of a cluster answers a request that carries no token.

    Args:
        address: HOST:PORT of its control store. One that cannot be asked counts as closed.
    """
    import grpc  # Ray's own; only those who join a cluster need it here

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_REQUEST)(b"", timeout=ANSWER_S)
        except grpc.RpcError:
            return False
    return True


def _create(path: Path) -> None:
    """Writes a new token; it is whole and private from the first moment on."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):  # another process was quicker: its token
            os.link(draft, path)
    finally:
        draft.unlink()


def _shared_mode(path: Path) -> int:
    """The file's mode if others may read or change it, else 0."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return 0  # Ray says so
    return mode if mode & 0o077 else 0


def _warn(message: str) -> None:
    print(f"prune-search: warning: {message}", file=sys.stderr, flush=True)
