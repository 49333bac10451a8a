"""How many replicas the cluster has room for, now and as its nodes come and go."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources

from neg_service.cluster.gcs import UnreachableNodes
from neg_service.cluster.scaling import Capacity
from neg_service.config import ClusterConfig, device_names
from neg_service.errors import ConfigurationError

log = logging.getLogger(__name__)

_MOST_CPUS = 4
_LOOK_SECONDS = 1


@dataclass(frozen=True)
class ReplicaSize:
    """What one replica takes of a node."""

    cpus: float
    gpus: float
    memory: int


@dataclass(frozen=True)
class Node:
    """What a node has."""

    cpus: float
    gpus: float
    memory: int


def wait_for_size(cluster: ClusterConfig, device: Any, memory: int) -> ReplicaSize:
    """`replica_size` on the nodes that there are or that come within `cluster.wait_seconds`.

    Raises:
        ConfigurationError: no node has room for a replica.
    """
    until = time.monotonic() + cluster.wait_seconds
    has_asked = False
    try:
        while True:
            try:
                return replica_size(cluster, device, memory, nodes(), free_nodes())
            except ConfigurationError as error:
                if time.monotonic() >= until:
                    raise
                if not has_asked:
                    log.info("waiting up to %.0f s for a node with room for a replica: %s", cluster.wait_seconds, error)
                    # Without a demand no autoscaler adds a node; with none running this changes nothing.
                    wanted = {"CPU": cluster.cpus_per_replica, "GPU": cluster.gpus_per_replica}
                    known = {name: amount for name, amount in wanted.items() if amount != "auto"}
                    request_resources(bundles=[known or {"CPU": 1}])
                    has_asked = True
                time.sleep(_LOOK_SECONDS)
    finally:
        # A demand outlives the process that made it.
        if has_asked:
            request_resources(bundles=[])


def draining_nodes() -> frozenset[str]:
    """Ids of the nodes that are being drained: pre-empted, scaled down, or taken out by hand."""
    # Ray's own libraries ask the same; no public call says it.
    return frozenset(ray._private.state.state.get_draining_nodes())


def nodes() -> list[Node]:
    """The nodes that are alive and stay."""
    draining = draining_nodes()
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [_node(node["Resources"]) for node in alive if node["NodeID"] not in draining]


def free_nodes(without: frozenset[str] = frozenset()) -> list[Node]:
    """What of the same nodes nobody uses, some left out."""
    left_out = draining_nodes() | without
    free = ray._private.state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return [_node(resources) for node, resources in free.items() if node not in left_out]


def _node(resources: Mapping[str, float]) -> Node:
    cpus, gpus, memory = (float(resources.get(name, 0)) for name in ("CPU", "GPU", "memory"))
    return Node(cpus, gpus, int(memory))


def replica_size(
    cluster: ClusterConfig, device: Any, memory: int, available: list[Node], free: Sequence[Node] = ()
) -> ReplicaSize:
    """What a replica takes, with `auto` filled in: a GPU if there are any, and a few CPUs of the smallest node.

    Several GPUs, all of one node, share the layers of one model. Of CPUs no more than are `free` where some are.

    Raises:
        ConfigurationError: larger than any node.
    """
    if not available:
        raise ConfigurationError("the cluster has no node, or all of them are being drained: start one, or wait")
    gpus = cluster.gpus_per_replica
    if gpus == "auto":
        names = device_names(device)
        wants = names == ["auto"] or names[0].startswith("cuda")
        gpus = len(names) if wants and any(node.gpus >= 1 for node in available) else 0
    if gpus > 1 and gpus != int(gpus):
        raise ConfigurationError(
            "more than 1 must be a whole number", setting="cluster.gpus_per_replica", value=f"{gpus:g}"
        )
    usable = [node for node in available if node.gpus >= gpus and node.cpus >= 1]
    cpus = cluster.cpus_per_replica
    if cpus == "auto":
        unused = [node for node in free if node.cpus >= 1]
        cpus = 1 if gpus else max(1, int(min(_MOST_CPUS, *(node.cpus for node in unused or usable or available))))
    size = ReplicaSize(float(cpus), float(gpus), memory)
    for key, wanted, most in (
        ("cluster.cpus_per_replica", size.cpus, max(node.cpus for node in available)),
        ("cluster.gpus_per_replica", size.gpus, max(node.gpus for node in available)),
    ):
        if wanted > most == 0:
            raise ConfigurationError(
                "no node has any; use auto or 0, or cluster.wait_seconds to wait for one that has",
                setting=key,
                value=f"{wanted:g}",
            )
        if wanted > most:
            raise ConfigurationError(
                f"the largest node has {most:g}; a replica must fit one node", setting=key, value=f"{wanted:g}"
            )
    largest = max(node.memory for node in available)
    if not gpus and size.memory > largest:
        raise ConfigurationError(
            f"a replica needs about {size.memory / 2**30:.1f} GiB of memory, the largest node has "
            f"{largest / 2**30:.1f} GiB: use a smaller model.source, model.dtype or job.shard_size",
            change="model.source",
        )
    if not _n_fitting(size, available):
        raise ConfigurationError(
            f"no node has {size.cpus:g} CPUs, {size.gpus:g} GPUs and {size.memory / 2**30:.1f} GiB together: "
            f"change cluster.cpus_per_replica or cluster.gpus_per_replica"
        )
    return size


def gpu_names(count: int) -> list[str]:
    """`model.device` for the GPUs of an actor."""
    return [f"cuda:{index}" for index in range(count)]


def replica_count(most: int | str, size: ReplicaSize, available: list[Node]) -> int:
    """How many replicas to run on these nodes: as many as fit or, told a number, that number.

    Those of a number that do not fit wait in Ray's queue, where an autoscaler sees them.
    """
    return _n_fitting(size, available) if isinstance(most, str) else most


def capacity_now(most: int | str, size: ReplicaSize, unreachable: UnreachableNodes | None = None) -> Capacity:
    """What there is at this moment, beside all that others use, and not on nodes that do not answer."""
    if isinstance(most, str):
        without = unreachable.nodes if unreachable else frozenset()
        return Capacity(None, _n_fitting(size, free_nodes(without)), draining_nodes())
    return Capacity(most, draining=draining_nodes())


def _n_fitting(size: ReplicaSize, available: list[Node]) -> int:
    return sum(_n_fitting_on(size, node) for node in available)


def _n_fitting_on(size: ReplicaSize, node: Node) -> int:
    # On a GPU the weights lie in the GPU's memory, of which Ray knows nothing. A part of a GPU is a part of one.
    if size.gpus:
        scarce = int(node.gpus) * int(1 / size.gpus) if size.gpus < 1 else node.gpus / size.gpus
    else:
        scarce = node.memory / size.memory
    return int(min(node.cpus / size.cpus, scarce))
