"""A real Prometheus that reads the nodes of a cluster on this machine by the shipped configuration, and is asked.

Its windows are shorter: what takes half an hour of an operator's time, a test has in a minute (`shortened`).
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

INFRA = Path(__file__).parent.parent.parent / "infra"
FASTER = 30
_UNIT = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def shortened(expression: str) -> str:
    """The same with all times divided by `FASTER`: windows, offsets, and ages of five minutes and more."""

    def shorter(match: re.Match[str]) -> str:
        return f"{max(1, int(match[1]) * _UNIT[match[2]] // FASTER)}s"

    faster = re.sub(r"\b(\d+)([smhd])\b", shorter, expression)
    return re.sub(r"([<>] )(\d{3,})\b", lambda match: f"{match[1]}{int(match[2]) // FASTER}", faster)


class Prometheus:
    """One that runs, at an address."""

    def __init__(self, address: str) -> None:
        self._address = address

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """What an expression gives now: labels in `metric`, and the `value` with its time.

        Raises:
            AssertionError: Prometheus refuses it.
        """
        found: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return found

    def firing(self) -> dict[tuple[str, str], str]:
        """What each alert that fires says, by its name and run."""
        return {
            (alert["labels"]["alertname"], alert["labels"]["run"]): alert["annotations"]["summary"]
            for alert in self._get("alerts")["alerts"]
            if alert["state"] == "firing"
        }

    def rules(self) -> list[dict[str, Any]]:
        """All rules, with what the last evaluation of each came to."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def targets(self) -> list[dict[str, Any]]:
        """What is scraped."""
        found: list[dict[str, Any]] = self._get("targets", state="active")["activeTargets"]
        return found

    def dropped(self) -> int:
        """How many targets were discovered and are not scraped."""
        return len(self._get("targets", state="dropped")["droppedTargets"])

    def _get(self, what: str, **asked: str) -> Any:
        url = f"{self._address}/api/v1/{what}?{urllib.parse.urlencode(asked)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as reply:
                answer = json.load(reply)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{asked}: {error.read().decode()}") from error
        assert answer["status"] == "success", answer
        return answer["data"]


@contextmanager
def prometheus(place: Path, discovery: Path) -> Iterator[Prometheus]:
    """A server with the shipped jobs and rules; nodes are found in Ray's own file, pods in one that is made here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shipped = yaml.safe_load((INFRA / "prometheus" / "prometheus.yaml").read_text())
    shipped["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for job in shipped["scrape_configs"]:
        if job["job_name"] == "ray":
            job["file_sd_configs"] = [{"files": [str(discovery)], "refresh_interval": "1s"}]
        else:
            # The nodes are scraped already: the server itself stands for the pod that is to be scraped.
            (place / "pods.json").write_text(json.dumps([_pod(address, "metrics"), _pod("127.0.0.1:1", "client")]))
            del job["kubernetes_sd_configs"]
            job["file_sd_configs"] = [{"files": [str(place / "pods.json")]}]
    (place / "prometheus.yaml").write_text(yaml.safe_dump(shipped))
    alerts = yaml.safe_load((INFRA / "prometheus" / "alerts.yaml").read_text())
    for rule in (rule for group in alerts["groups"] for rule in group["rules"]):
        rule["expr"] = shortened(rule["expr"])
        if "for" in rule:
            rule["for"] = shortened(rule["for"])
    (place / "alerts.yaml").write_text(yaml.safe_dump(alerts))
    command = [
        "prometheus", f"--config.file={place / 'prometheus.yaml'}", f"--storage.tsdb.path={place / 'data'}",
        f"--web.listen-address={address}", "--log.level=warn",
    ]  # fmt: skip
    with (place / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            _await(f"http://{address}/-/ready", server)
            yield Prometheus(f"http://{address}")
        finally:
            server.terminate()


def _pod(address: str, port: str) -> dict[str, Any]:
    labels = {
        "pod_label_app_kubernetes_io_name": "neg-service", "pod_container_port_name": port,
        "pod_label_ray_io_cluster": "neg", "pod_name": f"pod-{port}",
    }  # fmt: skip
    return {"targets": [address], "labels": {f"__meta_kubernetes_{name}": value for name, value in labels.items()}}


def _await(url: str, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, "Prometheus ended"
            assert time.monotonic() < until, "Prometheus does not answer"
            time.sleep(0.2)
