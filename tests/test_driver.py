"""The driver's parts that need no Ray: the watchdog, and what is refused before Ray starts."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest
import ray

from prunesearch.search import ConfigError, parse_config
from prunesearch.search.cluster import check_local, connect, connecting
from prunesearch.search.config import SearchConfig
from prunesearch.search.watchdog import watchdog


def _config(**sections: dict[str, object]) -> SearchConfig:
    return parse_config({"model": {"name": "resnet20"}, "data": {"name": "digits"}, **sections})


def test_watchdog_ends_a_hung_trial_and_says_which_key_did_it() -> None:
    before = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="resources.trial_timeout_s"), watchdog(0.05):
        time.sleep(5)
    assert time.monotonic() - start < 4
    assert signal.getsignal(signal.SIGALRM) is before


def test_watchdog_lets_a_quick_trial_pass() -> None:
    for limit in (None, 30.0):
        with watchdog(limit):
            pass
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"resources": {"cpu": 4096}}, "resources.cpu"),
        ({"resources": {"gpu": 4096}}, "resources.gpu"),
        ({"latency": {"threads": 4096}}, "latency.threads"),
    ],
)
def test_a_local_ray_is_not_asked_for_more_than_there_is(
    sections: dict[str, dict[str, object]], key: str
) -> None:
    with pytest.raises(ConfigError, match=f"`{key}` .=4096. must be at most"):
        check_local(_config(**sections))
    check_local(_config())


@pytest.mark.parametrize("failures", [1, 2])
def test_a_ray_that_starts_too_slowly_is_started_once_more(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def slow_start(**options: Any) -> None:
        calls.append(options)
        if len(calls) <= failures:
            raise Exception("The current node timed out during startup. This could happen.")

    monkeypatch.setattr("ray.init", slow_start)
    if failures == 1:
        with connect(None):
            assert len(calls) == 2 and calls[0] == calls[1]
        return
    with (
        pytest.raises(ConfigError, match="Ray must start.*twice.*Wait until.*--address"),
        connect(None),
    ):
        pass
    assert len(calls) == 2


def test_ray_that_does_not_answer_in_the_background_is_told_where_it_is_waited_for() -> None:
    with connecting("ray://nowhere:10001") as wait, pytest.raises(ConfigError, match="--address"):
        wait()
    with connecting("ray://nowhere:10001"):
        pass  # nobody waits: nobody is told


def test_ray_ends_with_the_block_that_it_was_started_for() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with connecting(None) as wait:
        wait()
        assert ray.is_initialized()
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) == before
