"""Where the files of a data set are looked for, and their download."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CACHE = Path("~/.cache/prune-search/data")
TIMEOUT_S = 20.0


def find_or_download(
    root: Path | None,
    *,
    name: str,
    subfolders: Sequence[str],
    complete: Callable[[Path], bool],
    download: Callable[[Path], object],
    system: Sequence[Path] = (),
) -> Path:
    """Finds the folder that holds a data set's files, or downloads them.

    With a `root`, only the root is searched (and downloaded into). Else $PRUNE_SEARCH_DATA, the
    system's folders and the cache are, in this order.

    Args:
        root: The user's folder.
        name: For messages.
        subfolders: Where in a folder the files may be; the folder itself is tried first.
        complete: Whether a folder holds all files.
        download: Puts the files in a folder, or raises OSError or RuntimeError.
        system: Folders of the operating system.

    Returns:
        The folder for which `complete` holds.

    Raises:
        ValueError: If the root is missing, or there are no files and they cannot be downloaded.
    """
    if root is not None and not root.is_dir():
        raise ValueError(
            f"`data.root` (={root}) must be a folder: there is none. Correct the path, or leave "
            "it out to use the default places."
        )
    cache = CACHE.expanduser()
    variable = os.environ.get("PRUNE_SEARCH_DATA")
    default = [*([Path(variable).expanduser()] if variable else []), *system, cache]
    places = [root] if root is not None else default
    found = next(_complete_folders(places, subfolders, complete), None)
    if found is not None:
        return found
    target = cache if root is None else root
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _socket_timeout(TIMEOUT_S):
            download(target)
    except (OSError, RuntimeError) as error:
        looked = ", ".join(str(place) for place in places)
        raise ValueError(
            f"`data.root` (={root}) must hold the files of {name}: there are none in {looked}, "
            f"and the download failed ({str(error).strip()[:200]}). Put the files there, or set "
            "`data.root` to where they are."
        ) from error
    found = next(_complete_folders([target], subfolders, complete), None)
    assert found is not None, f"the download of {name} left no complete folder in {target}"
    return found


def _complete_folders(
    places: Sequence[Path], subfolders: Sequence[str], complete: Callable[[Path], bool]
) -> Iterator[Path]:
    for place in places:
        for folder in (place, *(place / sub for sub in subfolders)):
            if complete(folder):
                yield folder


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Without one, a firewall that drops packets hangs the download for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
