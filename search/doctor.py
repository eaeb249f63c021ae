"""`prune-search doctor`: is this machine ready for a search?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FREE_DISK_GIB = 2


def diagnose() -> list[dict[str, Any]]:
    """Runs every check; each is `{check, ok, found}`."""
    return [_run(name, check) for name, check in CHECKS.items()]


def _run(name: str, check: Callable[[], tuple[bool, str]]) -> dict[str, Any]:
    try:
        ok, found = check()
    except Exception as error:  # a check that breaks is a finding
        ok, found = False, f"{type(error).__name__}: {error}"
    return {"check": name, "ok": ok, "found": found}


def _libraries() -> tuple[bool, str]:
    from .environment import environment

    libraries = environment()["libraries"]
    missing = [name for name, version in libraries.items() if version is None]
    return not missing, ", ".join(f"{name} {version}" for name, version in libraries.items())


def _hardware() -> tuple[bool, str]:
    from .environment import environment

    found = environment()
    return True, f"{found['cpu']}, {found['cores']} cores, {found.get('gpu', 'no GPU')}"


def _package() -> tuple[bool, str]:
    from .. import methods

    return True, str(Path(methods.__file__ or "").parent)


def _disk() -> tuple[bool, str]:
    free = shutil.disk_usage(os.getcwd()).free / 2**30
    return free >= FREE_DISK_GIB, f"{free:.1f} GiB free here"


def _cache() -> tuple[bool, str]:
    from .shelf import RESULTS, Shelf, cache_dir

    folder = cache_dir() / RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    size = sum(size for _, size in Shelf(folder).usage().values()) / 2**30
    return os.access(folder, os.W_OK), f"{size:.2f} GiB that runs share are kept in {folder}"


def _timm() -> tuple[bool, str]:
    if find_spec("timm") is None:
        return True, "not installed (pip install 'prune-search[timm]' for timm:NAME models)"
    return True, "installed"


def _ray() -> tuple[bool, str]:
    from .cluster import connect, worker_package

    with connect(None):
        return True, f"a local Ray runs, and its worker imports {worker_package()}"


CHECKS: dict[str, Callable[[], tuple[bool, str]]] = {
    "libraries": _libraries,
    "hardware": _hardware,
    "package": _package,
    "disk": _disk,
    "cache": _cache,
    "timm": _timm,
    "ray": _ray,
}
