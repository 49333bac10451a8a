"""python -m jobs.submit: send a scan, or another job, to a Ray cluster and follow it. `--help` says how."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from jobs.command_line import as_typed
from jobs.conf_folder import CONF, PROJECT
from jobs.control import ControlConfig
from jobs.descriptions import describe_plan
from jobs.entry import command, composed, in_one_line, refuse_credentials_in
from jobs.guard import EXIT_INTERRUPTED
from jobs.probe import ProbeConfig
from jobs.study import StudyConfig
from jobs.verify import VerifyConfig
from neg_service.config import ScanConfig, check, plain, typed
from neg_service.errors import ConfigurationError, DestinationError, StorageError
from neg_service.places import absolute, is_here, name_of, setting
from neg_service.storage.run import RUN_FILE, RunDirectory
from neg_service.storage.stores import open_store

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from neg_service.cluster.prepare import Prepared
    from neg_service.cluster.submission import Request

log = logging.getLogger(__name__)

JOBS = {
    "scan": ScanConfig, "control": ControlConfig, "probe": ProbeConfig, "study": StudyConfig, "verify": VerifyConfig
}  # fmt: skip
# Settings of `job` that decide what is done, and not how it is shown.
_DECIDING = ("name", "limit", "shard_size", "resume", "extend")
# What a configuration may name on this machine that the cluster has to have, too.
_FILES = (
    "dataset.source", "dataset.templates", "measure.edits", "measure.references", "measure.holding",
    "control.references", "control.holding", "neurons.list",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Submit, and follow unless told not to; the exit code of the job."""
    refuse_credentials_in(arguments)
    asked = _parser().parse_intermixed_args(arguments)
    return _submit(asked, composed(asked.job, asked.overrides, JOBS[asked.job]))


def _submit(asked: argparse.Namespace, config: DictConfig) -> int:
    # Slow to load: see `entry.py`.
    from ray.job_submission import JobStatus

    from neg_service.cluster.submission import check_driver, check_request, connect_to_job_server, last_of

    driver, environment = _amounts(_pairs("--driver", asked.driver)), _pairs("--env", asked.env)
    client = connect_to_job_server(asked.address)
    prepared = _planned(asked, config, client._address)
    if asked.job == "scan" and config.job.dry_run:
        if prepared is None:
            raise ConfigurationError(
                "the plan is made here, so leave out --unchecked", setting="job.dry_run", value="true"
            )
        # Before a look at the server: a job of that id is the scan itself, which the next command should find.
        print(describe_plan(prepared))
        return 0
    request = _request_of(asked, config, prepared, environment, driver)
    check_request(request, plain(config))
    check_driver(client._address, request.driver)
    last = last_of(client, request.submission_id)
    if last and last[1] is JobStatus.SUCCEEDED and not asked.again and (prepared is None or _is_complete(prepared)):
        log.info(
            "job %s has done this already%s", last[0], f": {prepared.uri}" if prepared else "; --again runs it anew"
        )
        if asked.no_wait:
            print(last[0])
        return 0
    return _send(client, request, prepared, no_wait=asked.no_wait)


def _planned(asked: argparse.Namespace, config: DictConfig, address: str) -> Prepared | None:
    """The plan of a scan, seen to fit the cluster; None for other jobs, and where --unchecked leaves it to the job."""
    # Slow to load: see `entry.py`.
    from neg_service.cluster.lineage_place import require_lasting_place
    from neg_service.cluster.prepare import prepare, require_lasting
    from neg_service.cluster.submission import check_room

    if asked.job != "verify":
        require_lasting(str(config.storage.uri))
        if config.job.extend is not None:
            require_lasting(str(config.job.extend), "job.extend")
        require_lasting_place(config.job.get("lineage"))
    if asked.job != "scan":
        return None
    scan = typed(ScanConfig, config)
    if asked.unchecked:
        check(scan)
        return None
    prepared = prepare(scan)
    check_room(address, prepared.config, prepared.memory)
    return prepared


def _request_of(
    asked: argparse.Namespace,
    config: DictConfig,
    prepared: Prepared | None,
    environment: Mapping[str, str],
    driver: Mapping[str, float],
) -> Request:
    # Slow to load: see `entry.py`.
    from neg_service.cluster.submission import Request

    files = _files(config)
    return Request(
        job=asked.job,
        submission_id=_submission_id(asked.job, prepared, config, files),
        overrides=[*as_typed(asked.overrides, JOBS[asked.job], is_sweep=False), *_model_by_full_path(config)],
        files=files,
        environment=environment,
        driver=driver,
    )


def _send(client: JobSubmissionClient, request: Request, prepared: Prepared | None, *, no_wait: bool) -> int:
    """Pack and submit the request, unless it is there, and follow its job; the exit code."""
    # Slow to load: see `entry.py`.
    from neg_service.cluster.submission import follow, pack, submit

    with tempfile.TemporaryDirectory() as directory:
        pack(request, Path(PROJECT), Path(CONF).relative_to(PROJECT), Path(directory))
        name, is_new = submit(client, request, Path(directory))
    there = "is submitted" if is_new else "is there already, as it was submitted"
    log.info("job %s %s at %s", name, there, client._address)
    if prepared:
        log.info("results: %s", prepared.uri)
    if no_wait:
        print(name)
        return 0
    try:
        return follow(client, name)
    except KeyboardInterrupt:
        log.warning("job %s goes on; the same command follows it again, `ray job stop %s` ends it", name, name)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.submit",
        description="Send a job to a Ray cluster, follow its log, and exit as it does. The same command again finds "
        "the job that waits or runs, and continues one that failed or was stopped.",
        epilog="The code, conf and local files that are named (dataset.source, dataset.templates, measure.edits, "
        "neurons.list, and references of control) travel with the job; a model's directory must be on every node. "
        "Secrets belong into the "
        "environment of the cluster's nodes: how a job is called can be seen by everybody who sees the cluster. "
        "A token that the cluster wants is taken from RAY_AUTH_MODE=token and RAY_AUTH_TOKEN. Example: python -m "
        "jobs.submit --address http://HEAD:8265 model=llama-3.2-3b dataset.source=my.jsonl storage.uri=s3://bucket/runs",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as of the job itself")
    parser.add_argument("--job", choices=JOBS, default="scan", help="which: python -m jobs.JOB (scan)")
    parser.add_argument(
        "--address", help="the job server; RAY_API_SERVER_ADDRESS if not given, else http://127.0.0.1:8265"
    )
    parser.add_argument("--no-wait", action="store_true", help="print the job's id and do not follow it")
    parser.add_argument("--again", action="store_true", help="run a probe or verify anew though it succeeded")
    parser.add_argument(
        "--unchecked", action="store_true", help="plan on the cluster: for a model or data that only its nodes have"
    )
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable, not a secret")
    parser.add_argument(
        "--driver", action="append", default=[], metavar="RESOURCE=AMOUNT",
        help="what the driver takes of a node, such as CPU=1; with nothing it runs on the head node",
    )  # fmt: skip
    return in_one_line(parser)


def _pairs(option: str, given: list[str]) -> dict[str, str]:
    for one in given:
        if not all(one.partition("=")):
            raise ConfigurationError(setting=option, value=one, allowed="NAME=VALUE")
    return {name: value for name, _, value in (one.partition("=") for one in given)}


def _amounts(given: dict[str, str]) -> dict[str, float]:
    try:
        return {name: float(amount) for name, amount in given.items()}
    except ValueError as error:
        raise ConfigurationError(f"{error}; must be RESOURCE=AMOUNT, such as CPU=1", setting="--driver") from error


def _submission_id(job: str, prepared: Prepared | None, config: DictConfig, files: dict[str, Path]) -> str:
    """From the fingerprint; where it can only be known on the cluster, from what decides it."""
    from neg_service.cluster.submission import files_in

    begin = "neg"
    if job == "scan" and config.job.forecast:
        # What has said how long the scan will take has not done it.
        job, begin = "forecast", "neg-forecast"
    if prepared is not None:
        return f"{begin}-{name_of(prepared.uri)}-{_digest([prepared.uri])}"
    decides = {key: value for key, value in plain(config).items() if key not in ("cluster", "hydra")}
    # How a run is stored, shown and watched is not what it is.
    decides["job"] = {key: value for key, value in decides.get("job", {}).items() if key in _DECIDING}
    decides["storage"] = {"uri": plain(config)["storage"].get("uri")}
    contents = {
        key: [hashlib.sha256(file.read_bytes()).hexdigest() for file in files_in(path)] for key, path in files.items()
    }
    return f"neg-{job}-{_digest([decides, contents])}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _files(config: DictConfig) -> dict[str, Path]:
    """The local files and folders that the configuration names, except a model's."""
    from neg_service.models.source import DEFAULT

    found = {}
    for key in _FILES:
        group, name = key.split(".")
        value = (config.get(group) or {}).get(name)
        if isinstance(value, str) and value != DEFAULT and is_here(value):
            found[key] = Path(absolute(value))
    return found


def _model_by_full_path(config: DictConfig) -> list[str]:
    from neg_service.models.source import DEFAULT

    source = str(config.model.source)
    if source == DEFAULT or Path(source).is_absolute() or not is_here(source):
        return []
    return [setting("model.source", absolute(source))]


def _is_complete(prepared: Prepared) -> bool:
    """Whether all is stored, as far as can be seen from here: else the job looks itself, and ends at once."""
    try:
        store = open_store(prepared.uri, prepared.config.storage.endpoint_url)
        store.check()
        done = RunDirectory(store, prepared.fingerprint, tuple(prepared.tables)).done()
        return store.get(RUN_FILE) is not None and set(prepared.plan.shards) <= done
    except (DestinationError, StorageError) as error:
        log.warning("whether all is stored cannot be seen from here, so the job looks: %s", error)
        return False


if __name__ == "__main__":
    # Ray's client tells of each upload and of each connection that it closes.
    for noisy in (
        "ray.dashboard.modules.dashboard_sdk",
        "ray.dashboard.modules.job.sdk",
        "ray._private.runtime_env.packaging",
        "botocore",
        "aiobotocore",
    ):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    command("submit", main)
