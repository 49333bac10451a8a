"""Joining a Ray cluster, or starting Ray on this machine: what Ray would hang on, or die of, is asked ahead.

Ray 2.60 waits without end at a port that accepts connections and says nothing, and ends the whole process at one where
nobody listens. So the head node is asked whether it is alive, with a deadline, before Ray is told to connect; and where
Ray is to start here, whether its sockets and files can lie in the place that it would take.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import ray
from ray._private.gcs_utils import create_gcs_channel
from ray._private.services import canonicalize_bootstrap_address
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.exceptions import AuthenticationError

from neg_service.config import ClusterConfig
from neg_service.errors import ConfigurationError, one_line

log = logging.getLogger(__name__)

# Tables never pass through the object store; messages are small.
_LOCAL_OBJECT_STORE_BYTES = 100 * 2**20
# A host that is there takes a connection sooner; what a server then needs may be longer.
_LISTEN_SECONDS = 10.0
_DAY_SECONDS = 86_400.0
_SILENT_SECONDS = 5.0
# What the name of a socket may have on Linux, and what Ray puts behind the place for temporary files.
_MOST_SOCKET_BYTES = 107
_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
_TOKEN = "or it wants another token (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN)"


def connect(
    cluster: ClusterConfig,
    show_replicas: bool = True,
    key: str = "cluster.address",
    limit_key: str = "cluster.connect_seconds",
) -> None:
    """Join the cluster of `cluster.address` or `$RAY_ADDRESS`, else start Ray on this machine; or stay where we are.

    `show_replicas` has Ray print here what replicas print, each line with the name of its process before it. `key` is
    where a person says the address, `limit_key` for how long to wait.

    Raises:
        ConfigurationError: there is no cluster at the address, it does not answer in time, or it runs another version
            of Ray or Python; or Ray cannot start here.
    """
    if ray.is_initialized():
        return
    named, address = _named(cluster, key)
    # Ray reports usage over the network and warns about GPUs unless told otherwise; a local start is nobody's business.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"address": address, "logging_level": logging.ERROR, "log_to_driver": show_replicas}
    if address == "local":
        # Ray would let its workers run behind all other programs: beside one that is busy on all cores, a replica got a
        # tenth of one.
        os.environ.setdefault("RAY_worker_niceness", "0")
        options |= {"include_dashboard": False, "object_store_memory": _LOCAL_OBJECT_STORE_BYTES}
        require_place_for_sockets()
    else:
        host, port = _host_and_port(address, named)
        _require_listener(host, port, named)
        _require_answer(host, port, named, cluster.connect_seconds, limit_key)
    try:
        ray.init(**options)
    except (OSError, RuntimeError, ValueError, AuthenticationError) as error:
        if address == "local":
            raise ConfigurationError(f"Ray does not start on this machine: {one_line(error)}") from error
        raise ConfigurationError(_why_not(error), given=named) from error


def disconnect() -> None:
    """Leave the cluster; a local one ends."""
    ray.shutdown()


def require_place_for_sockets() -> None:
    """Refuse a place for temporary files in which Ray cannot start.

    Raises:
        ConfigurationError: too long a name for sockets, or not a place that can be written.
    """
    for name in ("RAY_TMPDIR", "TMPDIR"):
        # Empty is not set, to all but Ray, which would take the current directory.
        if os.environ.get(name) == "":
            del os.environ[name]
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "RAY_TMPDIR")
    place = os.environ.get(name, "/tmp")
    most = _MOST_SOCKET_BYTES - len(_SOCKET.format(pid=os.getpid()))
    size = len(os.fsencode(place))
    if size > most:
        raise ConfigurationError(
            f"has {size} bytes, and Ray's sockets below it leave room for {most}: set RAY_TMPDIR to a shorter "
            "path, such as /tmp",
            setting=name,
            value=place,
        )
    if not Path(place).is_absolute():
        raise ConfigurationError(
            setting=name, value=place, allowed="an absolute path, for Ray's processes run elsewhere"
        )
    own = Path(place) / "ray"
    try:
        own.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=own).close()
    except OSError as error:
        raise ConfigurationError(
            f"Ray cannot write its files to {own}: {error.strerror or error}: set RAY_TMPDIR to a place that can "
            "be written",
            setting=name,
            value=place,
        ) from error


def _named(cluster: ClusterConfig, key: str) -> tuple[str, str]:
    """How the address was said, for messages, and what it is; `auto` finds the cluster of this machine."""
    address, said = cluster.address or "", key
    if address in ("", "auto") and os.environ.get("RAY_ADDRESS"):
        address, said = os.environ["RAY_ADDRESS"], "RAY_ADDRESS"
    address = address or "local"
    # What stands before an @ may be a password.
    named = f"{said}={re.sub('.*@', '***@', address)}"
    if re.match(r"https?://", address, re.IGNORECASE):
        raise ConfigurationError(
            f"is the address of a job server, to which python -m jobs.submit --address {address} sends a job; a "
            "cluster is joined at the port of its head, such as HEAD:6379",
            given=named,
        )
    if "://" in address:
        raise ConfigurationError(
            "replicas cannot be watched through Ray's client; join the cluster at the port of its head, such as "
            "HEAD:6379, or send the job with python -m jobs.submit --address http://HEAD:8265",
            given=named,
        )
    if address != "auto":
        return named, address
    try:
        found = canonicalize_bootstrap_address("auto")
    except (ConnectionError, ValueError) as error:
        raise ConfigurationError(
            "no Ray cluster runs on this machine: start one with `ray start --head`, or give the address of one "
            "elsewhere, such as HEAD:6379",
            given=named,
        ) from error
    return f"{named} ({found})", found or "local"


def _host_and_port(address: str, named: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16 or re.search(r"[\s/@]", host):
        raise ConfigurationError(
            "is no address of a cluster: give HOST:PORT, such as HEAD:6379, auto or local", given=named
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def _require_listener(host: str, port: int, named: str) -> None:
    """Ray ends the whole process when nothing answers at a host and port, so this is asked first."""
    try:
        socket.create_connection((host, port), timeout=_LISTEN_SECONDS).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"no Ray cluster answers there: {reason}", given=named) from error


def _require_answer(host: str, port: int, named: str, seconds: float, limit_key: str) -> None:
    """Ask the head node whether it is alive."""
    until = time.monotonic() + seconds
    channel = create_gcs_channel(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    try:
        alive = NodeInfoGcsServiceStub(channel).CheckAlive
        try:
            alive(CheckAliveRequest(), timeout=min(_SILENT_SECONDS, seconds))
        except grpc.RpcError as error:
            left = until - time.monotonic()
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED or left <= 0:
                raise
            log.info("%s: takes connections and does not answer; waiting for %.0f s more", named, left)
            # grpc takes a deadline that never comes for one that has passed.
            alive(CheckAliveRequest(), timeout=min(left, _DAY_SECONDS))
    except grpc.RpcError as error:
        raise ConfigurationError(_no_answer(error, seconds, limit_key), given=named) from error
    except (RuntimeError, ValueError, OSError, AuthenticationError) as error:
        raise ConfigurationError(_why_not(error), given=named) from error
    finally:
        channel.close()


def _no_answer(error: Any, seconds: float, limit_key: str) -> str:
    code, details = error.code(), " ".join(str(error.details()).split())
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return (
            f"takes connections, and no Ray cluster has answered there within {seconds:g} s ({limit_key}): is it the "
            f"port of the head node, such as HEAD:6379, and does what it is forwarded to still run?"
        )
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return f"no Ray cluster answers there, {_TOKEN}: {details[:200]}"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return (
            "what answers there is no head node of Ray: the port must be that of `ray start --head`, such as HEAD:6379"
        )
    kind = "an HTTP server, such as Ray's job server" if "http1" in details else "something else"
    reason = details.partition("last error: ")[2] or details
    return (
        f"no Ray cluster answers there, but {kind}, or nothing behind a port that is forwarded ({reason[:200]}): give "
        f"the port of the head node, such as HEAD:6379"
    )


def _why_not(error: Exception) -> str:
    """Why Ray did not let us in, in one line."""
    says = " ".join(str(error).split())
    if "Version mismatch" in says:
        return f"the cluster runs other versions than this program; both must be the same: {says[:300]}"
    if isinstance(error, AuthenticationError):
        return "the cluster wants a token, or another one: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
    return f"no Ray cluster answers there, {_TOKEN}: {one_line(error)}"
