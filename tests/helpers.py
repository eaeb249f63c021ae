"""A small real search, used by several test files."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from zygote import Zygote

Invoke = Callable[..., tuple[int, str, str]]  # the fixture `invoke`

PRUNE_SEARCH = [sys.executable, "-m", "prunesearch.search.cli"]

SMALL = """\
name: small
model: {name: resnet20}
data: {name: digits, image_size: 8, batch_size: 64, limit: 600, calibration_size: 64}
baseline: {epochs: 3, lr: 0.1}
space:
  criteria: [magnitude_l1, random]
  blocks: {mode: mask, order: oneshot, max_drop: 1.0}
  keep: {per: model, low: 0.3, high: 1.0}
recover: {epochs: 0.5, lr: 0.02}
objectives: {accuracy: maximize, macs: minimize}
search: {trials: 6, early_stop: true, seed: 0}
resources: {max_concurrent: 1}
latency: {runs: 20}
cache: {reuse: dense}
"""


def ranked(order: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The ranked path of an order: the blocks to drop if 0, 1, 2, ... are to go."""
    return tuple(tuple(order[:count]) for count in range(len(order) + 1))


def write_config(folder: Path, text: str = SMALL) -> Path:
    path = folder / "small.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@functools.cache
def _zygote() -> Zygote:
    return Zygote()


def command(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own."""
    words = [str(word) for word in args]
    env = os.environ | {"NO_COLOR": "1"}
    if any(name.startswith("RAY_AUTH") for name in env):  # Ray looks when it is imported
        words = [*PRUNE_SEARCH, *words]
        return subprocess.run(words, capture_output=True, text=True, timeout=400, env=env)
    return subprocess.CompletedProcess(
        words, *_zygote().run(words, cwd=Path.cwd(), env=env, timeout_s=400)
    )


def forget_user_code() -> None:
    """Modules of users' own models are imported anew: tests give theirs the same names."""
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]
