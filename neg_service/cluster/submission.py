"""Sending a job to a cluster's job server: what travels, under which id, and how it is followed to its end.

What travels is the code and `conf`, and the small files that the configuration names on this machine; never an
environment's secrets, for everybody who sees a job sees what it was sent with. The id of a job comes from the
fingerprint of its run, and Ray refuses an id that it knows: submitting twice does not run twice.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException
from tenacity import Retrying, before_sleep_log, retry_if_exception_type, stop_after_delay, wait_fixed

from neg_service.cluster.resources import Node, replica_size
from neg_service.config import ScanConfig
from neg_service.errors import ConfigurationError, NegServiceError, one_line
from neg_service.places import holds_credentials, refuse_credentials, texts_of, without_credentials
from neg_service.redaction import KEYS, SECRET_NAME

log = logging.getLogger(__name__)

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# Ray keeps what a job is sent with in the memory of its head node, and takes 500 MiB there.
MOST_BYTES = 100 * 2**20
INPUTS = "inputs"
_PACKAGES = ("neg_service", "jobs")
_ASK_SECONDS = 1.0
_PATIENCE_SECONDS = 60.0
_WAITING_SECONDS = 30.0
_ANSWER_SECONDS = 60.0
_MARK = "neg_service"
# What a job server that is away for a moment makes of a question.
_AWAY = (RuntimeError, OSError, requests.exceptions.RequestException)
_ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)


@dataclass(frozen=True)
class Request:
    """What to run: `python -m jobs.<job>` with `overrides`, and what of this machine goes with it.

    files: the local files that overrides name, by key. environment: variables that the job sees, and everybody else.
    driver: what the driver takes of a node, by Ray's names of resources; nothing lets it run beside the job server.
    """

    job: str
    submission_id: str
    overrides: Sequence[str]
    files: Mapping[str, Path] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    driver: Mapping[str, float] = field(default_factory=dict)

    @property
    def entrypoint(self) -> str:
        """The command on the cluster; files are named as they lie in the directory that is sent."""
        moved = [f"{key}={INPUTS}/{name}" for key, name in _names(self.files).items()]
        return shlex.join(["python", "-m", f"jobs.{self.job}", *self.overrides, *moved])


class _Client(JobSubmissionClient):
    """Ray's client, which by itself waits without end for a job server that takes a question and does not answer."""

    def _do_request(self, *arguments: Any, **options: Any) -> requests.Response:
        options.setdefault("timeout", _ANSWER_SECONDS)
        return super()._do_request(*arguments, **options)


def connect_to_job_server(address: str | None) -> JobSubmissionClient:
    """The job server at `address`, of `$RAY_API_SERVER_ADDRESS`, of an http `$RAY_ADDRESS`, or of this machine.

    Raises:
        ConfigurationError: nothing answers there, it wants a token, or it runs another version of Ray.
    """
    surroundings = [os.environ.get(name, "") for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")]
    given = address or next((value for value in surroundings if value.startswith("http")), DEFAULT_ADDRESS)
    if not re.match(r"https?://.", given):
        raise ConfigurationError(
            setting="--address",
            value=without_credentials(given),
            allowed=f"the job server's, such as {DEFAULT_ADDRESS}, not the port at which a cluster is joined",
        )
    refuse_credentials("--address", given)
    # Ray lets its variables win over what it is told.
    os.environ["RAY_API_SERVER_ADDRESS"] = given
    with _told(given):
        try:
            client = _Client(given)
            version = client._do_request("GET", "/api/version").json()["ray_version"]
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, AuthenticationError | requests.exceptions.RequestException):
                raise
            raise ConfigurationError(
                f"is no Ray job server: {one_line(error)}", setting="--address", value=given
            ) from error
    if version != ray.__version__:
        raise ConfigurationError(
            f"the cluster runs Ray {version}, this program is tested with {ray.__version__}: use an image with "
            "the versions of requirements.lock",
            setting="--address",
            value=given,
        )
    return client


def check_room(address: str, config: ScanConfig, memory: int) -> None:
    """Refuse what no node of the cluster could run, unless the job may wait for nodes to come.

    Raises:
        ConfigurationError: a replica fits no node.
    """
    if config.cluster.wait_seconds:
        return
    totals = _resources(address)
    nodes = [Node(total.get("CPU", 0.0), total.get("GPU", 0.0), int(total.get("memory", 0))) for total in totals]
    replica_size(config.cluster, config.model.device, memory, nodes)


def check_driver(address: str, driver: Mapping[str, float]) -> None:
    """Refuse a driver that fits no node: Ray would let the job wait, and not even stop it while it does.

    Raises:
        ConfigurationError: no node has all that is asked for.
    """
    if driver and not any(all(total.get(k, 0.0) >= v for k, v in driver.items()) for total in _resources(address)):
        asked = ", ".join(f"{name}={amount:g}" for name, amount in driver.items())
        raise ConfigurationError(
            "no node has that; without --driver the driver runs on the head node", setting="--driver", value=asked
        )


def _resources(address: str) -> list[dict[str, float]]:
    """What each node has in all."""
    with _told(address):
        found = list_nodes(
            address=address, filters=[("state", "=", "ALIVE")], limit=10_000, raise_on_missing_output=False
        )
    return [node.resources_total for node in found]


def check_request(request: Request, config: Mapping[str, Any]) -> None:
    """Refuse to send what should not or cannot travel; `config` is what the overrides come to.

    Raises:
        ConfigurationError: a secret, which everybody could read, or too many bytes.
    """
    for key, value in texts_of(config):
        if _holds_credentials(value):
            raise ConfigurationError(
                "holds credentials, and everybody who sees the job sees how it was called: set them in the "
                "environment of the cluster",
                setting=key,
            )
    for name, value in request.environment.items():
        if SECRET_NAME.search(name) or _holds_credentials(value):
            raise ConfigurationError(
                "looks like a secret, and everybody who sees the job sees its environment: set it in the "
                "environment of the cluster's nodes",
                setting="--env",
                value=name,
            )
    sizes = {key: sum(file.stat().st_size for file in files_in(path)) for key, path in request.files.items()}
    for key, size in sizes.items():
        if size > MOST_BYTES:
            raise ConfigurationError(
                f"{size / 2**20:.0f} MiB are too many to travel with a job, which may take "
                f"{MOST_BYTES / 2**20:.0f}: put it into object storage and name its URI",
                setting=key,
                value=request.files[key],
            )
    if sum(sizes.values()) > MOST_BYTES:
        raise ConfigurationError(
            f"{', '.join(sizes)}: {sum(sizes.values()) / 2**20:.0f} MiB are too many to travel with a job, which may "
            f"take {MOST_BYTES / 2**20:.0f}: put them into object storage and name their URIs"
        )


def pack(request: Request, project: Path, conf: Path, target: Path) -> None:
    """Copy what the job needs into the empty directory `target`: code, configuration, and the files of the request.

    conf: where below `project` the configuration lies, and then below `target`.
    """
    unneeded = shutil.ignore_patterns("__pycache__", "*.pyc", "*.md")
    for part in (*_PACKAGES, conf):
        shutil.copytree(project / part, target / part, ignore=unneeded, dirs_exist_ok=True)
    for key, name in _names(request.files).items():
        source = request.files[key]
        (target / INPUTS / name).parent.mkdir(parents=True)
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, target / INPUTS / name)


def submit(client: JobSubmissionClient, request: Request, directory: Path) -> tuple[str, bool]:
    """Send the job, unless one of the same id waits or runs; its name at the job server, and whether it is new.

    Ray takes a name once: after a job that ended the next one has a number, and continues what is stored.

    Raises:
        ConfigurationError: the job server refuses it.
    """
    try:
        return _asking(_NotNow)(_submit_once, client, request, directory)
    except _NotNow as error:
        raise ConfigurationError(f"the job server refuses the job: {error}") from error


def _asking(*errors: type[Exception]) -> Retrying:
    """Asks again for a while after one of these errors."""
    return Retrying(
        retry=retry_if_exception_type(errors),
        stop=stop_after_delay(_PATIENCE_SECONDS),
        wait=wait_fixed(_ASK_SECONDS),
        reraise=True,
    )


class _NotNow(Exception):
    """A job server that refuses a job now may take it, or have it, in a moment."""


def _submit_once(client: JobSubmissionClient, request: Request, directory: Path) -> tuple[str, bool]:
    last = last_of(client, request.submission_id)
    if last is not None and last[1] not in _ENDED:
        return last[0], False
    name = request.submission_id
    if last is not None:
        name += f"-{int(last[0].removeprefix(name).removeprefix('-') or 1) + 1}"
    with _told(client._address):
        try:
            client.submit_job(
                entrypoint=request.entrypoint,
                submission_id=name,
                runtime_env={"working_dir": str(directory), "env_vars": dict(request.environment)},
                metadata={_MARK: request.submission_id},
                entrypoint_num_cpus=request.driver.get("CPU"),
                entrypoint_num_gpus=request.driver.get("GPU"),
                entrypoint_resources={k: v for k, v in request.driver.items() if k not in ("CPU", "GPU")} or None,
            )
        except RuntimeError as error:
            # A head node that has just started says so; and somebody may have sent the same job just now.
            if "try again later" in str(error) or last_of(client, request.submission_id) != last:
                raise _NotNow(one_line(error)) from error
            raise ConfigurationError(f"the job server refuses the job: {one_line(error)}") from error
    return name, True


def last_of(client: JobSubmissionClient, submission_id: str) -> tuple[str, JobStatus] | None:
    """The newest job of a submission id and its state, if there is one."""
    with _told(client._address):
        jobs = [job for job in client.list_jobs() if (job.metadata or {}).get(_MARK) == submission_id]
    if not jobs:
        return None
    last = max(jobs, key=lambda job: job.start_time or 0)
    return str(last.submission_id), last.status


def follow(client: JobSubmissionClient, name: str) -> int:
    """Print the job's log as it grows until the job ends; its exit code.

    A job server that does not answer for a while is asked again; the job does not need it.

    Raises:
        NegServiceError: the job failed without a word of its own, or the job server stays away.
    """
    printer = _Printer(client, name)
    thread = threading.Thread(target=printer.run, daemon=True)
    thread.start()
    spoke = time.monotonic()
    while (info := _info_of(client, name)).status not in _ENDED:
        if info.status is JobStatus.PENDING and time.monotonic() - spoke > _WAITING_SECONDS:
            spoke = time.monotonic()
            log.info("job %s waits: %s", name, " ".join((info.message or "for the job server").split())[:300])
        time.sleep(_ASK_SECONDS)
    status = info.status
    thread.join(5)
    printer.finish()
    if status is JobStatus.SUCCEEDED:
        return 0
    if status is JobStatus.STOPPED:
        log.warning("job %s was stopped; the same command continues it", name)
        return 143
    if info.driver_exit_code is None:
        raise NegServiceError(f"job {name} failed: {' '.join((info.message or 'it says nothing').split())[:500]}")
    return int(info.driver_exit_code)


def _info_of(client: JobSubmissionClient, name: str) -> JobDetails:
    """What the job server says of a job, which may be away for a while."""
    try:
        return _asking(*_AWAY)(client.get_job_info, name)
    except _AWAY as error:
        raise NegServiceError(
            f"the job server at {client._address} has not answered for {_PATIENCE_SECONDS:.0f} s; job {name} "
            f"may go on: the same command follows it again: {one_line(error)}"
        ) from error


class _Printer:
    """Prints a job's log, each character once, however often the connection breaks."""

    def __init__(self, client: JobSubmissionClient, name: str) -> None:
        self._client, self._name = client, name
        self._printed = 0
        self._has_ended = False

    def run(self) -> None:
        Retrying(
            retry=retry_if_exception_type((*_AWAY, aiohttp.ClientError)),
            stop=lambda _: self._has_ended,
            wait=wait_fixed(_ASK_SECONDS),
            before_sleep=before_sleep_log(log, logging.DEBUG),
            retry_error_callback=lambda _: None,
        )(lambda: asyncio.run(self._tail()))

    def finish(self) -> None:
        self._has_ended = True
        try:
            rest = self._client.get_job_logs(self._name)
        except _AWAY:
            # The log lies on the driver's node, which may be what was lost.
            return
        self._print(rest, 0)

    async def _tail(self) -> None:
        seen = 0
        async for text in self._client.tail_job_logs(self._name):
            self._print(text, seen)
            seen += len(text)

    def _print(self, text: str, begins_at: int) -> None:
        fresh = text[max(0, self._printed - begins_at) :]
        self._printed += len(fresh)
        sys.stdout.write(fresh)
        sys.stdout.flush()


def _holds_credentials(value: str) -> bool:
    # Of the queries of URLs some are signatures, and nothing tells which.
    return holds_credentials(value) or without_credentials(value) != value or bool(KEYS.search(value))


def _names(files: Mapping[str, Path]) -> dict[str, str]:
    """Names in the directory that is sent: a folder a key, for a run is called after the name of its data set."""
    return {key: f"{key}/{re.sub('[^A-Za-z0-9._-]+', '-', path.name)}" for key, path in files.items()}


def files_in(path: Path) -> list[Path]:
    """A file itself, or the files of a folder, in the order of their names."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


@contextmanager
def _told(address: str) -> Iterator[None]:
    try:
        yield
    except requests.exceptions.Timeout as error:
        raise ConfigurationError(
            f"takes connections, and no job server has answered there within {_ANSWER_SECONDS:g} s: is it Ray's "
            "dashboard, such as http://HEAD:8265, and does what it is forwarded to still run?",
            setting="--address",
            value=address,
        ) from error
    except (ConnectionError, requests.exceptions.ConnectionError) as error:
        raise ConfigurationError(
            "no job server answers there; Ray needs its dashboard for it (`ray start --head "
            "--include-dashboard=true`), whose port, such as 8265, is not the one at which a cluster is joined",
            setting="--address",
            value=address,
        ) from error
    except (AuthenticationError, requests.exceptions.HTTPError) as error:
        if getattr(getattr(error, "response", None), "status_code", 401) not in (401, 403):
            raise ConfigurationError(one_line(error), setting="--address", value=address) from error
        raise ConfigurationError(
            "the cluster wants a token, or another one (set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN), or it is no "
            "Ray job server",
            setting="--address",
            value=address,
        ) from error
    except (requests.exceptions.RequestException, RayStateApiException, RayError) as error:
        raise ConfigurationError(one_line(error), setting="--address", value=address) from error
