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


def num_slots(config: SearchConfig, places: Sequence[ProbeActor]) -> int:
    """How many trials fit on the cluster at once, beside the probes; at least one.

    Where nodes are waited for, more of them may join while trials run: then as many trials as
    `resources.max_concurrent` says are asked for, and those that do not fit yet wait in Ray.

    Raises:
        ConfigError: If none fits.
    """
    resources = config.resources
    slots = _room(config, places)
    if slots < 1:
        raise ConfigError(_no_room(config))
    if resources.wait_for_nodes_s > 0 and resources.max_concurrent is not None:
        return resources.max_concurrent
    return min(slots, resources.max_concurrent or 2**31)


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
    if _room(config, places) < 1:
        needs = {"CPU": config.resources.cpu, "GPU": config.resources.gpu}
        bundle = {name: need for name, need in needs.items() if need > 0}
        lacking.append(_Lack(bundle, "a trial does not fit on the cluster", _no_room(config)))
    return lacking


def _room(config: SearchConfig, places: Sequence[ProbeActor]) -> int:
    """How many trials fit beside the probes."""
    have = ray.cluster_resources()
    fits = [
        (have.get(name, 0) - sum(place.options[option] for place in places)) / need
        for name, option, need in (
            ("CPU", "num_cpus", config.resources.cpu),
            ("GPU", "num_gpus", config.resources.gpu),
        )
        if need > 0
    ]
    return int(min(fits) + 1e-9) if fits else 1


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
