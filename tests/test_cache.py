"""What trials share: made once, whole or not there, and made again when its maker died."""

import threading
import time
import uuid
from typing import Any

import pytest
import torch

from prunesearch.search import cache as module
from prunesearch.search.cache import Cache, Made, address

KEY = {"kind": "scores", "criterion": "fgp", "options": {}}


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "shared")


def test_the_first_that_asks_makes_it_and_the_others_wait_for_it(cache):
    made = Made({"conv": torch.tensor([1.0, 2.0])}, {"accuracy": 0.5})
    name = address(KEY)
    assert cache.claim(name, "a") == ("make", None)
    assert cache.claim(name, "b") == ("wait", None)
    assert cache.claim(name, "a") == ("make", None), "a restarted maker goes on"
    cache.put(name, *made.pack())
    task, packed = cache.claim(name, "b")
    assert task == "ready"
    read = Made.unpack(*packed)
    assert torch.equal(read.tensors["conv"], made.tensors["conv"])
    assert read.info == {"accuracy": 0.5}


def test_a_failed_maker_leaves_its_place_to_the_next(cache):
    name = address(KEY)
    cache.claim(name, "a")
    cache.release(name, "b")  # not b's to release
    assert cache.claim(name, "b") == ("wait", None)
    cache.release(name, "a")
    assert cache.claim(name, "b") == ("make", None)


def test_a_silent_maker_is_taken_for_dead_and_a_renewed_one_is_not(cache, monkeypatch):
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    name = address(KEY)
    cache.claim(name, "a")
    now += module.LEASE_S - 1
    cache.renew(name, "a")
    now += module.LEASE_S - 1
    assert cache.claim(name, "b") == ("wait", None)
    now += 2
    assert cache.claim(name, "b") == ("make", None)


def test_a_result_outlives_its_cache_and_half_a_result_counts_for_none(cache, tmp_path):
    name = address(KEY)
    cache.put(name, *Made({"conv": torch.ones(2)}).pack())
    assert Cache(tmp_path / "shared").claim(name, "b")[0] == "ready"
    (tmp_path / "shared" / f"{name}.json").unlink()  # the writer died between the two files
    assert Cache(tmp_path / "shared").claim(name, "b")[0] == "make"


def test_the_address_depends_on_everything_in_the_key_and_on_nothing_else():
    assert address(KEY) == address(dict(reversed(KEY.items())))
    assert address(KEY) != address(KEY | {"options": {"class_agg": "min"}})
    assert address(KEY).startswith("scores-")


def test_two_trials_that_ask_at_once_make_it_once(tmp_path):
    """Through a real Ray: two workers, one keeper, one sparse training."""
    import ray

    from prunesearch.search.actors import Keeper, shares
    from prunesearch.search.cluster import connect, fan_out
    from prunesearch.search.config import ResourcesConfig

    key, makers = KEY, tmp_path / "makers"
    makers.mkdir()

    def ask(keeper: Any) -> tuple[list[float], float]:
        def make() -> Made:
            (makers / uuid.uuid4().hex).touch()
            time.sleep(3)
            return Made({"w": torch.ones(2)})

        made, waited = shares(keeper)(key, make)
        return made.tensors["w"].tolist(), waited

    with connect("local"):
        keeper = ray.remote(Keeper).options(num_cpus=0).remote(str(tmp_path))
        jobs = {f"t{i}": (ask, (keeper,)) for i in range(2)}
        values = dict(fan_out(jobs, resources=ResourcesConfig(cpu=0.5)))
    assert values["t0"][0] == values["t1"][0] == [1.0, 1.0]
    assert len(list(makers.iterdir())) == 1
    assert sorted(waited > 0 for _, waited in values.values()) == [False, True]


def test_a_lease_beats_until_it_ends(monkeypatch):
    from prunesearch.search import actors

    monkeypatch.setattr(actors, "LEASE_S", 0.04)
    beats: list[int] = []
    enough = threading.Event()

    def renew() -> None:
        beats.append(1)
        if len(beats) >= 3:
            enough.set()

    with actors._lease(renew):
        assert enough.wait(10)
    count = len(beats)
    time.sleep(0.05)
    assert len(beats) == count
