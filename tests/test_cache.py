"""What trials share: made once, whole or not there, and made again when its maker died."""

import math
import threading
import time
import uuid
from typing import Any

import pytest
import torch

from prunesearch.search import cache as module
from prunesearch.search.cache import Cache, Made, sharing_here, user_shelf
from prunesearch.search.config import parse_config
from prunesearch.search.shelf import Shelf, address

KEY = {"kind": "scores", "criterion": "fgp", "options": {}}
NAME = address(KEY)
MADE = Made({"conv": torch.tensor([1.0, 2.0])}, {"accuracy": 0.5})


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "run")


@pytest.fixture
def two_runs(tmp_path) -> tuple[Cache, Cache]:
    user = tmp_path / "user"
    return Cache(tmp_path / "a", user), Cache(tmp_path / "b", user)


def test_the_first_that_asks_makes_it_and_the_others_wait_for_it(cache):
    assert cache.claim(NAME, "a") == ("make", None)
    assert cache.claim(NAME, "b") == ("wait", None)
    assert cache.claim(NAME, "a") == ("make", None), "a restarted maker goes on"
    cache.put(NAME, MADE.pack(KEY))
    cache.release(NAME, "a")
    task, packed = cache.claim(NAME, "b")
    assert task == "ready"
    read = Made.unpack(packed)
    assert torch.equal(read.tensors["conv"], MADE.tensors["conv"])
    assert read.info == {"accuracy": 0.5}


def test_a_failed_maker_leaves_its_place_to_the_next(cache):
    cache.claim(NAME, "a")
    cache.release(NAME, "b")  # not b's to release
    assert cache.claim(NAME, "b") == ("wait", None)
    cache.release(NAME, "a")
    assert cache.claim(NAME, "b") == ("make", None)


def test_a_silent_maker_is_taken_for_dead_and_a_renewed_one_is_not(cache, monkeypatch):
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    cache.claim(NAME, "a")
    now += module.LEASE_S - 1
    cache.renew(NAME, "a")
    now += module.LEASE_S - 1
    assert cache.claim(NAME, "b") == ("wait", None)
    now += 2
    assert cache.claim(NAME, "b") == ("make", None)


def test_what_diverges_is_not_tried_again_in_the_run_but_in_another(two_runs, tmp_path):
    first, second = two_runs
    tries = []

    def make() -> Made:
        tries.append(1)
        raise FloatingPointError("the loss became nan")

    for cache in (first, first, Cache(tmp_path / "a", tmp_path / "user")):  # the last is resumed
        with pytest.raises(FloatingPointError, match="the loss became nan"):
            sharing_here(cache)(KEY, make)
    assert len(tries) == 1
    assert sharing_here(second)(KEY, lambda: MADE)[0] == MADE


def test_other_failures_are_not_remembered(cache):
    def make() -> Made:
        raise MemoryError

    with pytest.raises(MemoryError):
        sharing_here(cache)(KEY, make)
    assert sharing_here(cache)(KEY, lambda: MADE) == (MADE, 0.0)


def test_a_result_that_is_there_is_not_made(cache):
    shared = sharing_here(cache)
    assert shared(KEY, lambda: MADE)[0] is MADE
    read, waited = shared(KEY, lambda: pytest.fail("made again"))
    assert read.info == MADE.info and waited == 0.0


# --- two runs --------------------------------------------------------------------------------


def test_another_run_reads_what_one_made_and_keeps_it_in_its_own_folder(two_runs, tmp_path):
    first, second = two_runs
    sharing_here(first)(KEY, lambda: MADE)
    sharing_here(second)(KEY, lambda: pytest.fail("made again"))
    files = [tmp_path / shelf / NAME / "tensors.safetensors" for shelf in ("a", "user", "b")]
    assert len({file.stat().st_ino for file in files}) == 1  # one copy on the disk
    Shelf(tmp_path / "user").clear()
    alone = Cache(tmp_path / "b")
    assert alone.claim(NAME, "x")[0] == "ready"


def test_two_runs_that_ask_at_once_make_it_once(two_runs):
    first, second = two_runs
    assert first.claim(NAME, "a") == ("make", None)
    assert second.claim(NAME, "b") == ("wait", None)
    first.put(NAME, MADE.pack(KEY))
    first.release(NAME, "a")
    assert second.claim(NAME, "b")[0] == "ready"
    first.claim("other-" + "0" * 24, "a")
    first.release("other-" + "0" * 24, "a")
    assert second.claim("other-" + "0" * 24, "b") == ("make", None)


def test_what_the_run_made_is_shared_only_as_the_config_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNE_SEARCH_CACHE", str(tmp_path))
    data = {"model": {"name": "resnet20"}, "data": {"name": "digits"}}
    shared = {
        reuse: [
            user_shelf(parse_config(data | {"cache": {"reuse": reuse}}).cache, kind) is not None
            for kind in ("dense", "results")
        ]
        for reuse in ("all", "dense", "none")
    }
    assert shared == {"all": [True, True], "dense": [True, False], "none": [False, False]}


def test_a_user_folder_that_cannot_be_used_is_left_alone_and_said(tmp_path):
    (tmp_path / "user").write_text("a file where the folder should be")
    said: list[str] = []
    cache = Cache(tmp_path / "run", tmp_path / "user", math.inf, said.append)
    shared = sharing_here(cache)
    assert shared(KEY, lambda: MADE)[0] is MADE
    assert shared(KEY, lambda: pytest.fail("made again"))[0].info == MADE.info
    assert len(said) == 1 and "nothing more is shared with other runs" in said[0]


def test_the_user_folder_is_bounded_and_the_runs_is_not(tmp_path):
    cache = Cache(tmp_path / "run", tmp_path / "user", max_bytes=50_000)
    shared = sharing_here(cache)
    weights = torch.zeros(2_000)  # 8 kB
    for number in range(20):
        shared(KEY | {"number": number}, lambda: Made({"w": weights}))
        assert sum(s for _, s in Shelf(tmp_path / "user").usage().values()) <= 50_000
    assert Shelf(tmp_path / "user").usage()["scores"][0] >= 2
    assert Shelf(tmp_path / "run").usage()["scores"][0] == 20
    shared(KEY, lambda: Made({"w": torch.zeros(20_000)}))  # larger than the limit
    assert not (tmp_path / "user" / NAME).exists()


# --- through Ray -----------------------------------------------------------------------------


def test_two_trials_that_ask_at_once_make_it_once(tmp_path):
    """Through a real Ray: two workers, one keeper, one sparse training."""
    import ray

    from prunesearch.search.cluster import connect, fan_out
    from prunesearch.search.config import ResourcesConfig
    from prunesearch.search.keeper import Keeper, shares

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
    monkeypatch.setattr(module, "LEASE_S", 0.04)
    beats: list[int] = []
    enough = threading.Event()

    def renew() -> None:
        beats.append(1)
        if len(beats) >= 3:
            enough.set()

    with module._lease(renew):
        assert enough.wait(10)
    count = len(beats)
    time.sleep(0.05)
    assert len(beats) == count
