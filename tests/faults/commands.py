"""The command line in this process, with all that it prints; a traceback is an exception here."""

from __future__ import annotations

import io
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from prunesearch.search import cli


class Ended(NamedTuple):
    """How a command ended; warnings are part of `err`."""

    code: int
    out: str
    err: str


def invoke(*arguments: str | Path) -> Ended:
    """Runs one command."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["prune-search", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_: print(message, file=err)
            cli.main()
        code: object = 0
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.argv = before
    assert isinstance(code, int), code
    return Ended(code, out.getvalue(), err.getvalue())
