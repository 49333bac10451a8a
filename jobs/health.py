"""python -m jobs.health: whether the Ray node in this container is alive.

What a container's engine or a pod's probe runs every few seconds, so it loads neither Ray nor what other commands need
for their settings. It asks what Kubernetes' operator for Ray asks: the node's agent, which ends with its node, says
whether that answers, and on a head node whether the control store does. No token is needed for that. It deliberately
does not ask the job server: a node whose work goes on should not be ended because that is slow.
"""

from __future__ import annotations

import argparse
import http.client
import sys
import threading
from typing import NoReturn

from jobs.guard import EXIT_ERROR, tell

_PATH = "/api/healthz"
_PORTS = range(1, 65536)
_MOST_SECONDS = 3600
_GRACE_SECONDS = 0.1


def main(arguments: list[str]) -> int:
    """Ask the node; 0 when it is alive, 1 when it is not or does not answer in time."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.health",
        description="Ask the Ray node on this machine whether it is alive. Exit code: 0 when it is, 1 when it is not, "
        "or there is none, or it does not answer in time.",
    )
    parser.add_argument(
        "--port", type=int, default=52365, help="of the node's agent: ray start --dashboard-agent-listen-port (52365)"
    )
    parser.add_argument(
        "--seconds", type=float, default=5, help="how long it may take to answer, above 0, at most 3600 (5)"
    )
    parser.error = _refuse  # type: ignore[method-assign]
    asked = parser.parse_args(arguments)
    if asked.port not in _PORTS:
        parser.error(f"--port={asked.port}: must be from {_PORTS[0]} to {_PORTS[-1]}")
    if not 0 < asked.seconds <= _MOST_SECONDS:
        parser.error(f"--seconds={asked.seconds:g}: must be above 0, at most {_MOST_SECONDS}")
    return _within(asked.port, asked.seconds)


def _within(port: int, seconds: float) -> int:
    """Ask, and wait no longer than that: each byte of an answer begins the time of the socket anew."""
    ended: list[int] = []
    # A daemon, so that one that goes on waiting keeps no process alive.
    asking = threading.Thread(target=lambda: ended.append(_ask(port, seconds)), daemon=True)
    asking.start()
    # The socket's own time ends first, and says more.
    asking.join(seconds + _GRACE_SECONDS)
    if ended:
        return ended[0]
    tell(f"no Ray node answers on port {port}: its answer is not whole after {seconds:g} s")
    return EXIT_ERROR


def _ask(port: int, seconds: float) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request("GET", _PATH)
        answer = connection.getresponse()
        said = "; ".join(answer.read().decode(errors="replace").split("\n"))
    except (OSError, http.client.HTTPException) as error:
        tell(f"no Ray node answers on port {port}: {error}")
        return EXIT_ERROR
    finally:
        connection.close()
    if answer.status != http.client.OK:
        tell(f"the Ray node on port {port} is not well: {said}")
        return EXIT_ERROR
    print(said)
    return 0


def _refuse(message: str) -> NoReturn:
    """As other commands refuse a command line: in one line."""
    tell(f"{message} (see --help)")
    sys.exit(EXIT_ERROR)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
