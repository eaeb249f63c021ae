"""A cluster of three nodes; one is cut off in the middle of a run and comes back."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from faults import network
from faults.network import PORT, Network
from helpers import PRUNE_SEARCH, SMALL, write_config

from prunesearch.search.runs import Run

TRIALS = 12
REASON = network.missing()

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def test_a_node_that_is_cut_off_loses_nothing(tmp_path: Path) -> None:
    text = SMALL.replace("trials: 6, early_stop: true", f"trials: {TRIALS}, early_stop: false")
    text = text.replace("resources: {max_concurrent: 1}", "resources: {cpu: 1}")
    config = write_config(tmp_path, text.replace("epochs: 0.5", "epochs: 10"))
    out = tmp_path / "out"
    with Network(tmp_path, num_nodes=3) as net:
        net.start(0, "--num-cpus=0", '--resources={"latency_probe": 1}')
        net.wait_for(1)
        for i in (1, 2):  # in turn: they choose free names for their sockets
            net.start(i, "--num-cpus=1")
            net.wait_for(i + 1)
        log = (tmp_path / "driver.log").open("wb")
        driver = subprocess.Popen(
            net.inside(
                0, *PRUNE_SEARCH, "run", config, "--out", out,
                "--address", f"{net.address(0)}:{PORT}",
            ),
            stdout=log, stderr=log, env=net.environment,
        )  # fmt: skip
        try:
            _wait_for_rows(driver, out, 3)
            net.cut_off(2)
            net.wait_for(2)
            net.plug_in(2)
            net.wait_until_gone(2)  # Ray ends a node that was given up
            net.start(2, "--num-cpus=1")
            assert driver.wait(timeout=400) == 0, (tmp_path / "driver.log").read_text()
        finally:
            if driver.poll() is None:
                driver.kill()
                driver.wait()
            log.close()
    rows = Run(out).results()
    assert [row.trial_id for row in rows] == [f"t{n:05d}" for n in range(TRIALS)]
    assert {str(row.status) for row in rows} <= {"completed", "duplicate"}
    again = [row.message for row in rows if "its node was lost" in row.message]
    assert again and all(message.startswith("attempt 2, after") for message in again)
    assert Run(out).finished and "Traceback" not in (tmp_path / "driver.log").read_text()


def _wait_for_rows(driver: subprocess.Popen[bytes], out: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(list(out.glob("trials/*.parquet"))) < count:
        assert driver.poll() is None, (out.parent / "driver.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2)
