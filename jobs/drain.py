"""python -m jobs.drain: this node is about to go; let its replicas finish the shards that they have.

What a pod runs before it is ended (`infra/kuberay`). Ray is told that the node is being drained; drivers give its
replicas no more shards and let them go; when the last one is gone, or the time is over, this command ends. A drained
node takes no new work, also if it stays.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time

from jobs.entry import command, in_one_line
from neg_service.config import ClusterConfig
from neg_service.errors import ConfigurationError, NegServiceError

log = logging.getLogger(__name__)

_REPLICA = "Replica"
_ASK_SECONDS = 1.0


def main(arguments: list[str]) -> int:
    """Drain the node and wait; 0 when its replicas are gone, 3 when the time is over."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.drain",
        description="Tell Ray that a node is about to go, and wait until its replicas have finished the shards that "
        "they have. A drained node takes no new work, also if it stays; work of a cluster's only node then waits "
        "for another. Exit code: 0 when no replica is left there, 3 when the time is over, 1 for an error.",
    )
    parser.add_argument("--seconds", type=int, default=100, help="how long to wait at most (100)")
    parser.add_argument("--address", default="auto", help="the cluster; the one that this node belongs to if not given")
    parser.add_argument("--node-id", help="Ray's id of the node; this one if not given")
    parser.add_argument(
        "settings", nargs="*", metavar="job.traceback=true", help="show where an unexpected error came from"
    )
    asked = in_one_line(parser).parse_intermixed_args(arguments)
    if unknown := [one for one in asked.settings if one not in ("job.traceback=true", "job.traceback=false")]:
        raise ConfigurationError("the one setting of this command is job.traceback=true", given=unknown[0])
    return _drain(asked)


def _drain(asked: argparse.Namespace) -> int:
    # Slow to load: see `entry.py`.
    import ray
    from ray.util.state import list_actors, list_nodes

    from neg_service.cluster.connection import connect, disconnect

    until = time.monotonic() + asked.seconds
    cluster = ClusterConfig(address=asked.address)
    cluster.connect_seconds = min(cluster.connect_seconds, asked.seconds)
    connect(cluster, show_replicas=False, key="--address", limit_key="--seconds")
    try:
        node = asked.node_id or ray.get_runtime_context().get_node_id()
        alive = [one.node_id for one in list_nodes(filters=[("state", "=", "ALIVE")], limit=10_000)]
        if node not in alive:
            raise ConfigurationError(f"no such node; there are {', '.join(alive)}", setting="--node-id", value=node)
        if len(alive) == 1:
            log.warning("%s is the only node: work waits until another one comes", node)
        address = ray.get_runtime_context().gcs_address
        # Ray has no call for it that is public; its command is what operators know.
        drained = subprocess.run(
            [
                sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, "--node-id", node,
                "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the node is about to go",
                "--deadline-remaining-seconds", str(asked.seconds),
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if drained.returncode:
            raise NegServiceError(f"Ray does not drain node {node}: {' '.join(drained.stderr.split())[-300:]}")
        while time.monotonic() < until:
            actors = list_actors(filters=[("node_id", "=", node), ("state", "=", "ALIVE")], limit=1000)
            if not [actor for actor in actors if actor.class_name == _REPLICA]:
                log.info("no replica is left on node %s", node)
                return 0
            time.sleep(_ASK_SECONDS)
    finally:
        disconnect()
    log.warning("replicas are still at work on node %s after %d s", node, asked.seconds)
    return 3


if __name__ == "__main__":
    command("drain", main)
