"""Hosts of their own on one machine, for faults of the network between them: Linux namespaces on a bridge.

A host has its own network address, processes, name, `/tmp/ray` and `/dev/shm`; the disk is everybody's. Needed: root,
`ip` (iproute2), `nft` (nftables), `unshare` and `nsenter` (util-linux). All of it goes when the `Network` is closed,
whatever runs there included.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TOOLS = ("ip", "nft", "unshare", "nsenter")
# Private addresses; they exist in these namespaces alone.
_ADDRESS = "10.77.0.{}"
_FIRST = 11


def missing() -> str | None:
    """Why there can be no hosts here, or None where there can."""
    if os.geteuid() != 0:
        return "hosts of their own need root"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    lacking = [tool for tool in _TOOLS if shutil.which(tool, path=path) is None]
    return f"hosts of their own need {', '.join(lacking)}" if lacking else None


class Host:
    """One of them. `address` is the one that others reach it at; `lost`: packets that faults of its filters took."""

    def __init__(self, name: str, switch: str, number: int) -> None:
        """On the bridge of the namespace `switch`."""
        self.name, self.address, self.lost = name, _ADDRESS.format(_FIRST + number), 0
        self._started: list[subprocess.Popen[bytes]] = []
        self._switch, self._space, self._link = switch, f"{switch}-{name}", f"to-{name}"
        _run("ip", "netns", "add", self._space)
        _run(
            "ip",
            "link",
            "add",
            self._link,
            "netns",
            switch,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            self._space,
        )
        _run("ip", "-n", switch, "link", "set", self._link, "master", "bridge", "up")
        _run("ip", "-n", self._space, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", self._space, "link", "set", device, "up")
        # The first process of a host collects what its children leave, and takes all with it when it ends.
        begin = (
            f"hostname {name} && mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray && "
            "mount -t tmpfs -o size=1g none /dev/shm && while :; do sleep 1; done"
        )
        self._process = subprocess.Popen(
            ["ip", "netns", "exec", self._space, "unshare", "--mount", "--pid", "--uts", "--fork", "--mount-proc",
             "--kill-child", "sh", "-c", begin],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._first = self._await_first()

    def _await_first(self) -> int:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            for pid in _children(self._process.pid):
                # Ready once its name is its own and its folder is there.
                told = subprocess.run(
                    [*self._enter(pid), "sh", "-c", "hostname && grep -c '/dev/shm .*size=1048576k' /proc/mounts"],
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
                if told.stdout.split() == [self.name, "1"]:
                    return pid
            time.sleep(0.1)
        raise AssertionError(f"host {self.name} did not start")

    @staticmethod
    def _enter(pid: int) -> list[str]:
        return ["nsenter", "--target", str(pid), "--net", "--mount", "--pid", "--uts", "--"]

    def command(self, *arguments: str) -> list[str]:
        """What runs these arguments as a command on this host."""
        return [*self._enter(self._first), *arguments]

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end."""
        return subprocess.run(self.command(*arguments), text=True, capture_output=True, check=False, **options)

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a command there; it ends with the host at the latest."""
        self._started.append(subprocess.Popen(self.command(*arguments), stdin=subprocess.DEVNULL, **options))
        return self._started[-1]

    def end(self, what: str) -> None:
        """End with SIGKILL all processes of this host that have `what` in their command."""
        self.run("pkill", "-9", "-f", what)

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Its cable is out."""
        _run("ip", "-n", self._switch, "link", "set", self._link, "down")
        try:
            yield
        finally:
            _run("ip", "-n", self._switch, "link", "set", self._link, "up")

    @contextmanager
    def losing(self, percent: int) -> Iterator[None]:
        """So many of 100 packets get lost on their way in, and on their way out."""
        rule = f"numgen random mod 100 < {percent} counter drop"
        with self._filtered(outwards=rule, inwards=rule):
            yield

    @contextmanager
    def deaf_to(self, other: Host) -> Iterator[None]:
        """What it sends to another host is lost."""
        with self._filtered(outwards=f"ip daddr {other.address} counter drop"):
            yield

    @contextmanager
    def slow(self, kilobytes_a_second: int) -> Iterator[None]:
        """What it sends beyond so much is lost, which slows the senders down to that."""
        rule = f"oif eth0 limit rate over {kilobytes_a_second} kbytes/second burst 4 kbytes counter drop"
        with self._filtered(outwards=rule):
            yield

    @contextmanager
    def _filtered(self, outwards: str = "", inwards: str = "") -> Iterator[None]:
        chains = "".join(
            f"chain {chain} {{ type filter hook {chain} priority 0; policy accept; {rule}; }}\n"
            for chain, rule in (("output", outwards), ("input", inwards))
            if rule
        )
        self._nft(f"table ip fault {{\n{chains}}}")
        try:
            yield
        finally:
            self.lost += sum(map(int, re.findall(r"counter packets (\d+)", self._nft("list table ip fault"))))
            self._nft("delete table ip fault")

    def _nft(self, rules: str) -> str:
        return _run("ip", "netns", "exec", self._space, "nft", rules)

    def close(self) -> None:
        """End all that runs there, and remove it."""
        for process in (self._process, *self._started):
            process.kill()
            process.wait()
        _run("ip", "netns", "delete", self._space, check=False)


class Network:
    """A bridge with hosts on it; to be used with `with`."""

    def __init__(self) -> None:
        """With no host yet."""
        self._switch = f"neg{os.getpid()}"
        self._hosts: list[Host] = []

    def __enter__(self) -> Network:
        _run("ip", "netns", "add", self._switch)
        _run("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
        for device in ("lo", "bridge"):
            _run("ip", "-n", self._switch, "link", "set", device, "up")
        return self

    def host(self, name: str) -> Host:
        """Another one."""
        made = Host(name, self._switch, len(self._hosts))
        self._hosts.append(made)
        return made

    def __exit__(self, *_error: object) -> None:
        for host in self._hosts:
            host.close()
        _run("ip", "netns", "delete", self._switch, check=False)


def _children(pid: int) -> Sequence[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
