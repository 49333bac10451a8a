"""What a replica takes of a node, and how many fit: pure functions, no cluster."""

from __future__ import annotations

from typing import Any

import pytest

from neg_service.cluster.resources import Node, ReplicaSize, gpu_names, replica_count, replica_size
from neg_service.config import ClusterConfig
from neg_service.errors import ConfigurationError
from tests.refusals import ANY, refused

GIB = 2**30


def test_a_replica_takes_a_gpu_where_there_is_one() -> None:
    cpu, gpu = Node(8, 0, 32 * GIB), Node(16, 4, 64 * GIB)
    assert replica_size(ClusterConfig(), "auto", GIB, [cpu]) == ReplicaSize(4, 0, GIB)
    assert replica_size(ClusterConfig(), "auto", GIB, [Node(2, 0, 8 * GIB)]) == ReplicaSize(2, 0, GIB)
    assert replica_size(ClusterConfig(), "auto", GIB, [cpu, gpu]) == ReplicaSize(1, 1, GIB)
    assert replica_size(ClusterConfig(), "cpu", GIB, [cpu, gpu]).gpus == 0
    assert replica_size(ClusterConfig(gpus_per_replica=0.5, cpus_per_replica=2), "auto", GIB, [gpu]) == ReplicaSize(
        2, 0.5, GIB
    )
    assert replica_size(ClusterConfig(gpus_per_replica=4), "auto", GIB, [cpu, gpu]) == ReplicaSize(1, 4, GIB)
    assert replica_size(ClusterConfig(), "cuda:0,cuda:1", GIB, [cpu, gpu]) == ReplicaSize(1, 2, GIB)
    assert gpu_names(3) == ["cuda:0", "cuda:1", "cuda:2"]
    assert replica_size(ClusterConfig(), ["cuda:0", "cuda:1"], GIB, [gpu]) == ReplicaSize(1, 2, GIB)


def test_as_many_replicas_as_fit_or_as_asked() -> None:
    nodes = [Node(8, 0, 3 * GIB), Node(4, 0, 32 * GIB)]
    # The first node has memory for 3 of 4 that its CPUs would allow, the second CPUs for 2.
    assert replica_count("auto", ReplicaSize(2, 0, GIB), nodes) == 5
    assert replica_count(2, ReplicaSize(2, 0, GIB), nodes) == 2
    assert replica_count("auto", ReplicaSize(1, 0.25, 99 * GIB), [Node(16, 2, GIB)]) == 8
    # A part of a GPU is a part of one: two of 0.4 each on each of two.
    assert replica_count("auto", ReplicaSize(1, 0.4, GIB), [Node(16, 2, GIB)]) == 4


def test_a_replica_takes_no_more_cpus_than_are_free_where_some_are() -> None:
    nodes = [Node(4, 0, 32 * GIB)]
    assert replica_size(ClusterConfig(), "auto", GIB, nodes, [Node(3, 0, 32 * GIB)]).cpus == 3
    assert replica_size(ClusterConfig(), "auto", GIB, nodes, [Node(0.5, 0, 32 * GIB)]).cpus == 4


def test_a_cluster_whose_nodes_are_still_to_come_has_no_room() -> None:
    for nodes in ([], [Node(0, 0, 32 * GIB)]):
        with refused(ConfigurationError, says="no node"):
            replica_size(ClusterConfig(), "auto", GIB, nodes)


@pytest.mark.parametrize(
    ("cluster", "memory", "refusal"),
    [
        (ClusterConfig(cpus_per_replica=9), GIB, ("cluster.cpus_per_replica", 9, "the largest node has 8")),
        (ClusterConfig(gpus_per_replica=1), GIB, ("cluster.gpus_per_replica", 1, "no node has any")),
        (
            ClusterConfig(gpus_per_replica=1.5),
            GIB,
            ("cluster.gpus_per_replica", 1.5, "more than 1 must be a whole number"),
        ),
        (ClusterConfig(), 33 * GIB, (ANY, ANY, "needs about 33.0 GiB of memory, the largest node has 32.0 GiB")),
    ],
)
def test_a_replica_larger_than_any_node_is_refused(
    cluster: ClusterConfig, memory: int, refusal: tuple[Any, ...]
) -> None:
    with refused(ConfigurationError, *refusal):
        replica_size(cluster, "auto", memory, [Node(8, 0, 32 * GIB)])
