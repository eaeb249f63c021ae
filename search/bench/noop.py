"""A trial that does nothing, or sleeps: what the engine itself costs. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import time
from typing import Any

from ray import tune

from ..records import TrialResult, TrialStatus


class NoOp(tune.Trainable):
    """Answers as a trial worker does, with invented metrics that make a real front."""

    def setup(self, config: dict[str, Any], sleep_s: tuple[float, float] = (0.0, 0.0)) -> None:
        """Takes the range from which each trial's length is drawn."""
        self._spec, self._sleep_s = config, sleep_s

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Takes the next trial."""
        self._spec = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Sleeps, then invents: more is kept, more accurate and slower, with some noise."""
        started = time.time()
        draw = random.Random(self._spec["seed"])
        time.sleep(draw.uniform(*self._sleep_s))
        cost, noise = draw.random(), draw.random()
        accuracy = 0.9 * cost**0.3 * (0.8 + 0.2 * noise)
        row = TrialResult(
            self._spec["trial_id"],
            TrialStatus.COMPLETED,
            candidate=self._spec["candidate_json"],
            widths={f"layer{n}": 64 for n in range(20)},
            accuracy=accuracy,
            accuracy_drop=0.9 - accuracy,
            latency_ms=2.0 * cost,
            speedup=1.0 / cost,
            macs=int(1e6 * cost),
            seed=self._spec["seed"],
            host=f"{os.uname().nodename}:{os.getpid()}",
            started_at=started,
            finished_at=time.time(),
        )
        return {"done": True, "row": json.dumps(dataclasses.asdict(row))}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to keep."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to take."""
