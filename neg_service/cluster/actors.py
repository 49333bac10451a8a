"""A run's replicas as Ray's actors: how one is placed, launched and ended, and what there is capacity for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import ray

from neg_service.cluster import gcs
from neg_service.cluster.messages import Destination, LogStyle
from neg_service.cluster.replica import ACTOR_OPTIONS, Replica, Worker
from neg_service.cluster.resources import ReplicaSize, capacity_now
from neg_service.cluster.scaling import Capacity


class RayActors:
    """The actors of one run, all alike, and numbered in the order in which they are launched."""

    def __init__(
        self,
        make_worker: Callable[[], Worker],
        destination: Destination | None,
        size: ReplicaSize,
        most: int | str,
        logs: LogStyle | None = None,
    ) -> None:
        """`make_worker` is called in the actor. `most` is how many there may be, or auto: as many as fit."""
        self.unreachable_nodes = gcs.UnreachableNodes()
        self._make_worker, self._destination, self._logs = make_worker, destination, logs or LogStyle()
        self._size, self._most = size, most
        self._numbers = count()

    def launch(self) -> Any:
        """See `pool.Actors`."""
        actor = ray.remote(Replica).options(
            label_selector=gcs.labels_without(self.unreachable_nodes.nodes),
            num_cpus=self._size.cpus,
            num_gpus=self._size.gpus,
            # On a GPU the weights lie in the GPU's memory, of which Ray knows nothing.
            memory=None if self._size.gpus else self._size.memory or None,
            **ACTOR_OPTIONS,
        )
        return actor.remote(self._make_worker, self._destination, replace(self._logs, replica=next(self._numbers)))

    def end(self, actor: Any) -> None:
        """See `pool.Actors`."""
        ray.kill(actor)

    def capacity(self) -> Capacity:
        """See `pool.Actors`."""
        return capacity_now(self._most, self._size, self.unreachable_nodes)

    def is_node_lost(self, actor: Any, node: str) -> bool:
        """See `pool.Actors`."""
        return gcs.is_node_lost(actor, node)
