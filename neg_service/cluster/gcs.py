"""What the cluster's control store (Ray's GCS) says of replicas and nodes, and whether a node answers this process.

No public call says which way an actor died; what is used here is what Ray's own command line uses.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.core.generated.common_pb2 import ActorDiedErrorContext

log = logging.getLogger(__name__)

_REACH_SECONDS = 1.0
_MOST_AT_ONCE = 32
_LOOK_SECONDS = 15.0


def is_node_lost(actor: Any, node: str) -> bool:
    """Whether a replica died with its node, `node` as it named it itself, or in some other way."""
    try:
        told = ray._private.state.actors(actor._actor_id.hex())
        alive = {each["NodeID"] for each in ray.nodes() if each["Alive"]}  # type: ignore[no-untyped-call]
    except (RuntimeError, ray.exceptions.RayError) as error:
        log.info("the cluster does not say how a replica died: %s", error)
        return False
    return died_with_its_node(told.get("DeathCause"), bool(node) and node not in alive)


def died_with_its_node(cause: Any, is_node_gone: bool) -> bool:
    """As `is_node_lost`, from the cause of death that the GCS keeps of an actor."""
    reason = getattr(getattr(cause, "actor_died_error_context", None), "reason", None)
    return is_node_gone or reason == ActorDiedErrorContext.Reason.NODE_DIED


class UnreachableNodes:
    """The nodes that do not answer this process, though the cluster may count them as alive."""

    def __init__(self) -> None:
        """None so far."""
        self.nodes: frozenset[str] = frozenset()

    def add(self, node: str) -> None:
        """A replica there could not be reached."""
        self.nodes |= {node} - {""}

    def look_again(self) -> None:
        """Forget those that answer again, and those that are gone for good, on which nothing is placed anyway."""
        if not self.nodes:
            return
        places = {
            node["NodeID"]: (node["NodeManagerAddress"], node["NodeManagerPort"])
            for node in ray.nodes()  # type: ignore[no-untyped-call]
            if node["Alive"] and node["NodeID"] in self.nodes
        }
        with ThreadPoolExecutor(_MOST_AT_ONCE) as pool:
            answers = dict(zip(places, pool.map(_answers, places.values()), strict=True))
        self.nodes = frozenset(node for node, answered in answers.items() if not answered)


def labels_without(nodes: Iterable[str]) -> dict[str, str] | None:
    """Ray's label selector for any node but these."""
    ids = ",".join(sorted(nodes))
    return {"ray.io/node-id": f"!in({ids})"} if ids else None


def _answers(place: tuple[str, int]) -> bool:
    try:
        socket.create_connection(place, timeout=_REACH_SECONDS).close()
    except OSError:
        return False
    return True


def end_with_the_driver(
    state: Callable[[], str | None] | None = None,
    end: Callable[[], None] = lambda: os._exit(1),
    every_seconds: float = _LOOK_SECONDS,
) -> None:
    """End this actor's process when the cluster says that the actor is dead: its driver is gone, or gave it up.

    Ray ends it itself where its message arrives. After a time without a network it does not, and then the process would
    go on with what it was told. Only the cluster's own word counts: how long nothing was heard of the driver says
    nothing, since shards and waits for storage may take hours. `state` asks for the actor's state.
    """
    ask = state or _own_state

    def watch() -> None:
        while True:
            time.sleep(every_seconds)
            try:
                told = ask()
            # While the cluster does not answer it says nothing.
            except (RuntimeError, OSError, ray.exceptions.RayError):
                continue
            if told == "DEAD":
                log.warning("the driver is gone, or has given this replica up: it ends itself")
                end()
                return

    threading.Thread(target=watch, name="driver-watch", daemon=True).start()


def _own_state() -> str | None:
    told: dict[str, Any] = ray._private.state.actors(ray.get_runtime_context().get_actor_id())
    return told.get("State")
