"""A folder as a zip archive, made while it is sent: nothing is kept in memory or on disk."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path
from typing import Any

PIECE = 256 * 1024
EPOCH = (1980, 1, 1, 0, 0, 0)  # the same files give the same archive


def zipped(folder: Path) -> Iterator[bytes]:
    """The pieces of an archive of `folder`, its own name first in every path.

    Files are stored, not compressed: weights hardly shrink. Links are left out.
    """
    sink = _Sink()
    with zipfile.ZipFile(sink, "w") as archive:  # it writes only
        for path in files_of(folder):
            name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = 0o644 << 16
            with path.open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                while piece := source.read(PIECE):
                    target.write(piece)
                    yield sink.taken()
    yield sink.taken()


def files_of(folder: Path) -> list[Path]:
    """The files in a folder and below, by path."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


class _Sink(RawIOBase):
    """Keeps what is written until it is taken; cannot be rewound."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def taken(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)
