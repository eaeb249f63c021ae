"""What an attacker would like to have run: it leaves a file behind."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

CANARY = Path("canary")  # in the current folder


class Payload:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {CANARY}",)


_ARGUMENTS = f"S'{CANARY}'\nS'w'\n".encode()
PICKLES = {
    "protocol 0": pickle.dumps(Payload(), protocol=0),
    "protocol 2": pickle.dumps(Payload(), protocol=2),
    "protocol 5": pickle.dumps(Payload(), protocol=5),
    "in a mapping": pickle.dumps({"data": [Payload()]}, protocol=4),
    "as an instance": b"(" + _ARGUMENTS + b"ibuiltins\nopen\n.",
    "as an object": b"(cbuiltins\nopen\n" + _ARGUMENTS + b"o.",
}


def run_code() -> bool:
    """Whether a payload has run in the current folder; the next one can be told again."""
    ran = CANARY.exists()
    CANARY.unlink(missing_ok=True)
    return ran
