"""A folder on an object store, named by a URI that `pyarrow.fs` understands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from .store import atomic_write_bytes
from .yaml_source import ConfigError

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "file")
OPTIONS = frozenset(
    {"region", "scheme", "endpoint_override", "allow_delayed_open", "project_id"}
    | {"tls_ca_file_path", "tls_ca_dir_path", "tls_verify_certificates", "retry_limit_seconds"}
    | {"enable_tls", "blob_storage_authority", "dfs_storage_authority"}
    | {"credential_kind", "client_id"}
)
"""What may stand behind the `?`: nothing that could be a secret."""
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash: what `Path` makes of two
_NAME = re.compile(r"(_corrupt-)?[A-Za-z0-9][A-Za-z0-9._-]*")
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials",
    "gs": "the file that GOOGLE_APPLICATION_CREDENTIALS names",
    "gcs": "the file that GOOGLE_APPLICATION_CREDENTIALS names",
}


class UnreachableError(ConfigError):
    """The object store refuses, or does not answer."""


class Stamp(NamedTuple):
    """What tells one version of a stored file from another: bytes, and second of writing."""

    size: int
    second: int


def is_uri(place: str | Path) -> bool:
    """Whether a run folder is on an object store.

    Raises:
        ConfigError: If it is a URI that has lost a slash.
    """
    found = _URI.match(str(place))
    if found and (isinstance(place, Path) or "://" not in str(place)):
        raise ConfigError(
            f"`RUN_DIR` (={place}) must be a string with :// to name an object store: a path has "
            "no double slash. Give the URI as it is."
        )
    return found is not None


def join(uri: str, name: str) -> str:
    """The URI of `name` in the folder `uri`."""
    parts = urlsplit(uri)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}").geturl()


def is_safe(name: str) -> bool:
    """Whether a relative path is one of a run folder's files: no temporary one, no way out."""
    return all(_NAME.fullmatch(part) for part in name.split("/"))


class Remote:
    """The files in a folder of an object store.

    Args:
        uri: `s3://BUCKET/PREFIX/NAME`, and the like of `SCHEMES`.

    Raises:
        ConfigError: If it is no such URI, or holds a secret.
        UnreachableError: Here and in each method, if the store refuses or does not answer.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri = checked(uri)
        from pyarrow import fs  # libraries of every store there is: only for who needs them

        self._types = fs.FileType
        self._selector = fs.FileSelector
        with self._reaching():
            try:
                self._fs, root = fs.FileSystem.from_uri(uri)
            except ValueError as error:
                raise ConfigError(
                    f"`RUN_DIR` (={uri}) must be a URI that pyarrow understands: {_line(error)}"
                ) from error
        self._root = root.rstrip("/")
        self._is_local = self._fs.type_name == "local"

    def files(self) -> dict[str, Stamp]:
        """The files of a run folder, by relative path; foreign ones are left out."""
        found = {}
        for info in self._list(recursive=True):
            name = info.path.removeprefix(f"{self._root}/")
            if info.type == self._types.File and is_safe(name):
                found[name] = _stamp(info)
        return found

    def folders_with(self, name: str) -> list[str]:
        """Names of the folders directly inside that hold a file `name`, sorted."""
        folders = [
            info.base_name
            for info in self._list(recursive=False)
            if info.type == self._types.Directory and is_safe(info.base_name)
        ]
        return sorted(folder for folder in folders if self.stamp(f"{folder}/{name}") is not None)

    def stamp(self, name: str) -> Stamp | None:
        """The version of a file; None if it is not there."""
        with self._reaching():
            info = self._fs.get_file_info(self._path(name))
        return _stamp(info) if info.type == self._types.File else None

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: If it is not there.
        """
        with (
            self._reaching(),
            self._fs.open_input_stream(self._path(name), compression=None) as stream,
        ):
            data: bytes = stream.read()
        return data

    def write(self, name: str, data: bytes) -> Stamp:
        """Writes a file: whole, or not at all."""
        with self._reaching():
            if self._is_local:
                atomic_write_bytes(self._path(name), data)
            else:
                path = self._path(name)
                with self._fs.open_output_stream(path, compression=None) as stream:
                    stream.write(data)
        return self.stamp(name) or Stamp(len(data), 0)

    def delete(self, name: str) -> None:
        """Deletes a file, if it is there."""
        with self._reaching(), suppress(FileNotFoundError):
            self._fs.delete_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _list(self, *, recursive: bool) -> list[Any]:
        selector = self._selector(self._root, allow_not_found=True, recursive=recursive)
        with self._reaching():
            found: list[Any] = self._fs.get_file_info(selector)
        if not found:
            self._check_bucket()
        return found

    def _check_bucket(self) -> None:
        if self._is_local:
            return
        bucket = self._root.split("/")[0]
        with self._reaching():
            missing = self._fs.get_file_info(bucket).type == self._types.NotFound
        if missing:
            raise UnreachableError(
                f"`RUN_DIR` (={self.uri}) must be in a bucket that exists: there is no {bucket}. "
                "Make it first, or name another."
            )

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UnreachableError(
                f"`RUN_DIR` (={self.uri}) must be reachable: {_line(error)}. Look at the address, "
                f"the network and the credentials ({_where(urlsplit(self.uri).scheme)})."
            ) from error


def checked(uri: str) -> str:
    """The URI as it is stored: a final slash is no other folder.

    One of no known store, one that leaves its bucket and one with a secret are refused.

    Raises:
        ConfigError: Which does not repeat the secret.
    """
    try:
        parts = urlsplit(uri)
        known = parts.scheme in SCHEMES and uri.isprintable() and not parts.fragment
    except ValueError:
        known = False
    if not known:
        raise ConfigError(
            f"`RUN_DIR` (={uri.split('?')[0].rpartition('@')[2]}) must be a folder or a URI of "
            f"{', '.join(SCHEMES)}. Write it as s3://BUCKET/PREFIX/NAME."
        )
    _refuse_credentials(parts)
    names = unquote(parts.path).strip("/").split("/")
    if not {"..", "."}.isdisjoint(names) or "" in names[1:]:
        raise ConfigError(
            f"`RUN_DIR` (={uri}) must not hold `.`, `..` or an empty name: it would be outside "
            "its bucket, or another name for the same folder. Write it without."
        )
    return parts._replace(path=parts.path.rstrip("/")).geturl()


def _refuse_credentials(parts: SplitResult) -> None:
    user, at, rest = f"{parts.netloc}{parts.path}".rpartition("@")  # a secret key may hold a slash
    shown = f"{parts.scheme}://{'***@' if at else ''}{rest}"
    azure = parts.scheme in ("abfs", "abfss") and {":", "/"}.isdisjoint(user)  # its container
    public = parts.scheme in ("gs", "gcs") and user == "anonymous"
    if at and not (azure or public or (parts.scheme == "file" and not parts.netloc)):
        raise ConfigError(
            f"`RUN_DIR` (={shown}) must not hold credentials: it is printed and stored. "
            f"Put them into {_where(parts.scheme)}."
        )
    options = parse_qsl(parts.query, keep_blank_values=True)
    unknown = sorted({key for key, value in options if key not in OPTIONS or "@" in value})
    if unknown:
        raise ConfigError(
            f"`RUN_DIR` (={shown}) must not have the option {', '.join(unknown)}: it could hold "
            f"credentials, and a URI is printed and stored. Put those into "
            f"{_where(parts.scheme)}; there are the options {', '.join(sorted(OPTIONS))}."
        )


def _where(scheme: str) -> str:
    return _CREDENTIALS.get(scheme, "the environment variables of the store's own tools")


def _stamp(info: Any) -> Stamp:
    return Stamp(info.size or 0, (info.mtime_ns or 0) // 10**9)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300].rstrip(".")
