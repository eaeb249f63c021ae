"""Shared by all tests: one torch thread, and caches and homes that are never the user's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import Invoke


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    patch = pytest.MonkeyPatch()
    cache = tmp_path_factory.mktemp("cache")
    patch.setenv("PRUNE_SEARCH_CACHE", str(cache))
    yield cache
    patch.undo()


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Calls the command line in this process: words -> exit code, stdout, stderr."""

    def call(*args: str | Path) -> tuple[int, str, str]:
        from prunesearch.search import cli

        monkeypatch.setattr(sys, "argv", ["prune-search", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return code or 0, captured.out, captured.err

    return call
