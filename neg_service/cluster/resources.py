"""Connecting to Ray, and how many replicas the cluster has room for."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from typing import Any

import ray

from neg_service.config import ClusterConfig, device_names
from neg_service.errors import ConfigurationError

log = logging.getLogger(__name__)

# Results never pass through the object store; receipts and prompts are small.
_LOCAL_OBJECT_STORE_BYTES = 100 * 2**20
_MOST_CPUS = 4
_CONNECT_SECONDS = 10


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


def connect(cluster: ClusterConfig) -> None:
    """Join the cluster of `cluster.address` or `$RAY_ADDRESS`, else start Ray on this machine; or stay where we are.

    Raises:
        ConfigurationError: there is no cluster at the address.
    """
    if ray.is_initialized():
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    # Ray reports usage over the network and warns about GPUs unless told otherwise; a local start is nobody's business.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"address": address, "logging_level": logging.ERROR, "log_to_driver": True}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": _LOCAL_OBJECT_STORE_BYTES}
    _require_listener(address)
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigurationError(
            f"cluster.address={address}: no Ray cluster answers there: {str(error).splitlines()[0]}"
        ) from error


def _require_listener(address: str) -> None:
    """Ray ends the whole process when nothing answers at a host and port, so this is asked first."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigurationError(
            f"cluster.address={address}: no Ray cluster answers there: {error.strerror or error}"
        ) from error


def disconnect() -> None:
    """Leave the cluster; a local one ends."""
    ray.shutdown()


def nodes() -> list[Node]:
    """The nodes that are alive."""
    return [
        Node(
            cpus=float(node["Resources"].get("CPU", 0)),
            gpus=float(node["Resources"].get("GPU", 0)),
            memory=int(node["Resources"].get("memory", 0)),
        )
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]


def replica_size(cluster: ClusterConfig, device: Any, memory: int, available: list[Node]) -> ReplicaSize:
    """What a replica takes, with `auto` filled in: a GPU if there are any, and a few CPUs of the smallest node.

    Several GPUs, all of one node, share the layers of one model.

    Raises:
        ConfigurationError: larger than any node.
    """
    gpus = cluster.gpus_per_replica
    if gpus == "auto":
        names = device_names(device)
        wants = names == ["auto"] or names[0].startswith("cuda")
        gpus = len(names) if wants and any(node.gpus >= 1 for node in available) else 0
    if gpus > 1 and gpus != int(gpus):
        raise ConfigurationError(f"cluster.gpus_per_replica={gpus:g}: more than 1 must be a whole number")
    usable = [node for node in available if node.gpus >= gpus and node.cpus >= 1]
    cpus = cluster.cpus_per_replica
    if cpus == "auto":
        cpus = 1 if gpus else min(_MOST_CPUS, *(node.cpus for node in usable or available))
    size = ReplicaSize(float(cpus), float(gpus), memory)
    for key, wanted, most in (
        ("cluster.cpus_per_replica", size.cpus, max(node.cpus for node in available)),
        ("cluster.gpus_per_replica", size.gpus, max(node.gpus for node in available)),
    ):
        if wanted > most == 0:
            raise ConfigurationError(f"{key}={wanted:g}: no node has any; use auto or 0")
        if wanted > most:
            raise ConfigurationError(f"{key}={wanted:g}: the largest node has {most:g}; a replica must fit one node")
    largest = max(node.memory for node in available)
    if not gpus and size.memory > largest:
        raise ConfigurationError(
            f"a replica needs about {size.memory / 2**30:.1f} GiB of memory, the largest node has "
            f"{largest / 2**30:.1f} GiB: use a smaller model.source, model.dtype or job.shard_size"
        )
    if not _room(size, available):
        raise ConfigurationError(
            f"no node has {size.cpus:g} CPUs, {size.gpus:g} GPUs and {size.memory / 2**30:.1f} GiB together: "
            f"change cluster.cpus_per_replica or cluster.gpus_per_replica"
        )
    return size


def gpu_names(count: int) -> list[str]:
    """`model.device` for the GPUs of an actor."""
    return [f"cuda:{index}" for index in range(count)]


def replica_count(replicas: int | str, size: ReplicaSize, available: list[Node], n_shards: int) -> int:
    """How many replicas to run: as asked, or as many as fit; never more than there are shards."""
    room = _room(size, available)
    wanted = room if isinstance(replicas, str) else replicas
    if wanted > room:
        log.warning("cluster.replicas=%d, but only %d fit now; the others wait for room", wanted, room)
    return max(1, min(wanted, n_shards))


def _room(size: ReplicaSize, available: list[Node]) -> int:
    return sum(_room_on(size, node) for node in available)


def _room_on(size: ReplicaSize, node: Node) -> int:
    # On a GPU the weights lie in the GPU's memory, of which Ray knows nothing.
    scarce = node.gpus / size.gpus if size.gpus else node.memory / size.memory
    return int(min(node.cpus / size.cpus, scarce))
