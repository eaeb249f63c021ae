"""A real S3-compatible server on loopback, behind a gate that can be shut."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

BUCKET = "bucket"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Gate:
    """A port that forwards to another one while it is open; while it is shut nobody answers."""

    def __init__(self, target: int) -> None:
        self._target, self.port = target, 0
        self._listener: socket.socket | None = None
        self._sockets: list[socket.socket] = []
        self.open()

    def open(self) -> None:
        listener = self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def shut(self) -> None:
        assert self._listener is not None
        sockets, self._sockets = [self._listener, *self._sockets], []
        for one in sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                here, _ = listener.accept()
                there = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [here, there]
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=_copy, args=pair, daemon=True).start()


class S3:
    """The server.

    Attributes:
        gate: The way to it.
    """

    def __init__(self, port: int) -> None:
        self.gate = Gate(port)

    def uri(self, path: str, bucket: str = BUCKET) -> str:
        return f"s3://{bucket}/{path}?scheme=http&endpoint_override=127.0.0.1:{self.gate.port}"


@contextmanager
def s3_server() -> Iterator[S3]:
    """Starts the server, with one bucket; the environment must hold `CREDENTIALS`."""
    from pyarrow.fs import S3FileSystem

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | CREDENTIALS,
    )
    try:
        _wait_for(port, process)
        S3FileSystem(
            scheme="http", endpoint_override=f"127.0.0.1:{port}", allow_bucket_creation=True
        ).create_dir(BUCKET)
        yield S3(port)
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None and time.monotonic() < deadline, "no S3 server"
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
