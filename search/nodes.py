"""What a search needs of the cluster's nodes: how many trials fit, and where probes measure."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .cluster import PROBE, probe_resources  # first: it sets Ray's environment

# isort: split
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from .cache import Say
from .config import DEFAULT_PROBE, ConfigError, SearchConfig

POLL_S = 1.0


@dataclass(frozen=True)
class ProbeActor:
    """An actor for the probes of one node: they measure one after the other.

    Attributes:
        probes: Their names.
        options: The actor's: what it takes of its node.
    """

    probes: tuple[str, ...]
    options: Mapping[str, Any]


def await_nodes(config: SearchConfig, say: Say) -> None:
    """Returns when trials and probes have their nodes; asks an autoscaler for what is missing.

    Args:
        config: `resources.wait_for_nodes_s` says how long they may take.
        say: Told what is waited for.

    Raises:
        ConfigError: If they are not there in time.
    """
    limit_s = config.resources.wait_for_nodes_s
    deadline = time.monotonic() + limit_s
    while (lacking := _lacking(config)) and time.monotonic() < deadline:
        for lack in lacking:
            say(f"waiting up to {limit_s:g} s for nodes: {lack.has}")
        demand = placement_group([lack.bundle for lack in lacking])  # autoscalers see it
        try:
            while _lacking(config) == lacking and time.monotonic() < deadline:
                time.sleep(POLL_S)
        finally:
            remove_placement_group(demand)
    if lacking:
        raise ConfigError("\n".join(lack.message for lack in lacking))


def place_probes(config: SearchConfig) -> list[ProbeActor]:
    """An actor for each node that a probe names; the default probe is in the first.

    Without named probes the default one goes to its own node if there is one, else to any with
    the device that it needs.

    Raises:
        ConfigError: If a node or a share of a GPU is missing.
    """
    names_of: dict[str, list[str]] = {}
    for name, resource in probe_resources(config).items():
        node = _node_with(resource)
        if node is None and config.probes:
            raise ConfigError(_no_node(name, resource))
        names_of.setdefault(node or "", []).append(name)
    places: list[ProbeActor] = []
    for node, names in names_of.items():
        gpu = _gpu_share(config, names, node, sum(p.options["num_gpus"] for p in places))
        own = {probe_resources(config)[name]: 1 for name in names} if node else {}
        cpu = 0 if node or gpu else config.latency.threads
        places.append(
            ProbeActor(tuple(names), {"num_cpus": cpu, "num_gpus": gpu, "resources": own})
        )
    return places


@dataclass(frozen=True)
class Room:
    """What there is room for at a time.

    Attributes:
        train: Trials that train, or all where `resources.evaluate` is not set.
        evaluate: Trials that only evaluate, beside them. 0: they take the others' room.
        most: All together.
        evaluators: Ids of the nodes where those that only evaluate belong; empty: on any.
    """

    train: int
    evaluate: int
    most: int
    evaluators: tuple[str, ...] = ()

    def admits(self, training: int, evaluating: int) -> tuple[bool, bool]:
        """Whether one more that trains, and one more that only evaluates, may start.

        Args:
            training: How many of those run.
            evaluating: How many of these run.
        """
        if training + evaluating >= self.most:
            return False, False
        if not self.evaluate:
            return (training + evaluating < self.train,) * 2
        return training < self.train, evaluating < self.evaluate


def find_room(config: SearchConfig, places: Sequence[ProbeActor]) -> Room:
    """What fits on the cluster as it is now, beside the probes; at least one trial.

    Where nodes are waited for, an autoscaler has to see that more are wanted: then as many trials
    as `resources.max_concurrent` says are asked for, and those that do not fit yet wait in Ray.

    Args:
        config: Says what a trial takes.
        places: The probes.
    """
    resources = config.resources
    train, evaluate = max(1, _num_fitting(config, places)), 0
    evaluators = _evaluators(config)
    if evaluators:
        evaluate = sum(evaluators.values())
    elif resources.evaluate:
        evaluate = _num_fitting(config, places, beside=train)
        if not evaluate and train > 1:
            train -= 1  # both kinds take the same cores: neither may wait for the other for ever
            evaluate = _num_fitting(config, places, beside=train)
    most = train + evaluate
    if resources.max_concurrent is not None:
        if resources.wait_for_nodes_s > 0:
            train = most = resources.max_concurrent
        most = min(most, resources.max_concurrent)
    return Room(train, evaluate, most, tuple(evaluators))


# --- what is missing ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lack:
    """Something that no node has: as Ray asks for it, as it is, and as an error."""

    bundle: dict[str, float]
    has: str
    message: str


def _lacking(config: SearchConfig) -> list[_Lack]:
    lacking = []
    if config.probes:
        lacking = [
            _Lack({resource: 1.0}, f"none has the resource {resource}", _no_node(name, resource))
            for name, resource in probe_resources(config).items()
            if _node_with(resource) is None
        ]
    try:
        places = [] if lacking else place_probes(config)
    except ConfigError as error:
        return [_Lack({"GPU": 1.0}, "the probe has no GPU", str(error))]
    if _num_fitting(config, places) < 1:
        needs = {"CPU": config.resources.cpu, "GPU": config.resources.gpu}
        bundle = {name: need for name, need in needs.items() if need > 0}
        lacking.append(_Lack(bundle, "a trial does not fit on the cluster", _no_room(config)))
    return lacking


def _num_fitting(
    config: SearchConfig, places: Sequence[ProbeActor], *, beside: int | None = None
) -> int:
    """How many trials fit beside the probes.

    Args:
        config: Says what a trial takes.
        places: The probes.
        beside: None counts trials that train; a number those that only evaluate, beside so many.
    """
    have = ray.cluster_resources()
    train, evaluate = config.resources, config.resources.evaluate
    takes = train if beside is None or evaluate is None else evaluate
    fits = []
    for name, option, need, taken in (
        ("CPU", "num_cpus", takes.cpu, train.cpu),
        ("GPU", "num_gpus", takes.gpu, train.gpu),
    ):
        free = have.get(name, 0) - sum(place.options[option] for place in places)
        if need > 0:
            fits.append((free - (beside or 0) * taken) / need)
    return max(0, int(min(fits) + 1e-9))


def _evaluators(config: SearchConfig) -> dict[str, int]:
    """How many trials that only evaluate fit on each node without a GPU, where the others train.

    Ray would pack them onto the fullest nodes: on the cores beside the GPUs, which training needs.
    """
    evaluate = config.resources.evaluate
    if evaluate is None or evaluate.gpu > 0 or config.resources.gpu == 0:
        return {}
    nodes = [n for n in ray.nodes() if n["Alive"] and not n["Resources"].get("GPU")]
    fits = {n["NodeID"]: int(n["Resources"].get("CPU", 0) / evaluate.cpu) for n in nodes}
    return {node: number for node, number in sorted(fits.items()) if number}


def _no_room(config: SearchConfig) -> str:
    have = ray.cluster_resources()
    return (
        f"`resources` (cpu={config.resources.cpu}, gpu={config.resources.gpu}) must fit on "
        f"the cluster beside the latency probe: it has {have.get('CPU', 0):g} CPUs and "
        f"{have.get('GPU', 0):g} GPUs. Lower resources.cpu or resources.gpu, or add nodes "
        "(resources.wait_for_nodes_s waits for them)."
    )


def _no_node(name: str, resource: str) -> str:
    start = f"`ray start --address=HEAD:6379 --resources='{{\"{resource}\": 1}}'`"
    if name == DEFAULT_PROBE:
        return (
            f"`latency` must be measured on a node with the resource {PROBE} where there are "
            "`probes`: no node of the cluster has it, and on any other two probes might measure "
            f"at the same time. Start its node with {start}."
        )
    return (
        f"`probes.{name}.resource` (={resource}) must be a resource of a node: no node of the "
        f"cluster has it. Start its node with {start}, or delete the probe."
    )


# --- nodes and devices --------------------------------------------------------------------------


def _node_with(resource: str) -> str | None:
    """The id of the node with a whole unit of a resource: always the same one of several."""
    have = {
        n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get(resource, 0) >= 1
    }
    return min(have, default=None)


def _gpu_share(config: SearchConfig, names: Sequence[str], node: str, taken: float) -> float:
    """What the probes take of a GPU: one where there is one to spare, else a share, as trials do.

    Args:
        config: The run's config.
        names: The probes on the node.
        node: Its id; empty where the probe may be on any.
        taken: By the probes of other nodes.
    """
    on_gpu = [name for name in names if config.all_probes[name].device == "cuda"]
    if not on_gpu:
        return 0.0
    have = ray.cluster_resources().get("GPU", 0) - taken
    there = next((n["Resources"].get("GPU", 0) for n in ray.nodes() if n["NodeID"] == node), have)
    spare = round(have - config.resources.gpu, 4)
    share: float = 1.0 if spare >= 1 else min(spare, config.resources.gpu)
    if share <= 0 or there <= 0:
        key = f"probes.{on_gpu[0]}" if on_gpu[0] else "latency"
        raise ConfigError(
            f"`{key}.device` (=cuda) must have a share of a GPU: "
            f"{'its node' if there <= 0 else 'the cluster'} has {min(there, have):g} and a trial "
            f"takes {config.resources.gpu:g}. Set resources.gpu: 0.5, or {key}.device: cpu."
        )
    return share
