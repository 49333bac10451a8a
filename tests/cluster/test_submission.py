"""What travels with a job and what must not: plain functions, no cluster."""

from __future__ import annotations

import importlib
import shlex
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from ray.job_submission import JobStatus

from jobs.command_line import as_typed
from jobs.entry import CONF, composed
from jobs.submit import _files, _is_complete, _model_by_full_path, _planned, _submission_id, main
from neg_service.cluster import submission
from neg_service.cluster.prepare import prepare, require_lasting
from neg_service.cluster.submission import MOST_BYTES, Request, check_request, pack
from neg_service.config import DatasetConfig, ModelConfig, ScanConfig, StorageConfig, plain
from neg_service.errors import ConfigurationError, NegServiceError
from neg_service.places import setting
from tests.here import scan_here
from tests.refusals import NOT_GIVEN, refused


def test_code_configuration_and_named_files_travel_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "my words (1).jsonl").write_text("{}")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "a.toml").write_text("")
    files = {"dataset.source": tmp_path / "my words (1).jsonl", "dataset.templates": tmp_path / "templates"}
    request = Request("scan", "neg-x", ["dataset.source=my words.jsonl", "job.limit=3"], files)
    target = tmp_path / "sent"
    target.mkdir()
    pack(request, Path(CONF).parent, Path("conf"), target)
    assert sorted(path.name for path in target.iterdir()) == ["conf", "inputs", "jobs", "neg_service"]
    assert not list(target.rglob("__pycache__"))
    assert (target / "neg_service" / "prompts" / "templates_of_tasks" / "agnews.toml").exists()
    assert sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) < 3 * 2**20
    command = shlex.split(request.entrypoint)
    assert command[:3] == ["python", "-m", "jobs.scan"]
    # What is named last holds: the place where the file will lie.
    assert command[-2:] == [
        "dataset.source=inputs/dataset.source/my-words-1-.jsonl",
        "dataset.templates=inputs/dataset.templates/templates",
    ]
    assert all((target / part.partition("=")[2]).exists() for part in command[-2:])


@pytest.mark.parametrize(
    ("source", "environment", "setting", "value"),
    [
        ("https://me:hidden@host/a.csv", {}, "dataset.source", NOT_GIVEN),
        ("https://host/a.csv?X-Amz-Signature=hidden", {}, "dataset.source", NOT_GIVEN),
        ("facts", {"AWS_SECRET_ACCESS_KEY": "hidden"}, "--env", "AWS_SECRET_ACCESS_KEY"),
        ("facts", {"HF_TOKEN": "hidden"}, "--env", "HF_TOKEN"),
        ("facts", {"HTTPS_PROXY": "http://me:hidden@proxy"}, "--env", "HTTPS_PROXY"),
        ("facts", {"NOTE": "hf_hidden" + "x" * 30}, "--env", "NOTE"),
        ("AKIAHIDDEN0123456789", {}, "dataset.source", NOT_GIVEN),
    ],
)
def test_secrets_do_not_travel_and_are_not_repeated(
    source: str, environment: dict[str, str], setting: str, value: Any
) -> None:
    # However the value was quoted on the command line.
    with initialize_config_dir(CONF, version_base="1.3"):
        config = plain(compose("scan", overrides=[f"dataset.source='{source}'"]))
    with refused(ConfigurationError, setting, value, says="holds credentials|looks like a secret") as caught:
        check_request(Request("scan", "x", [], environment=environment), config)
    assert "hidden" not in str(caught.value).lower()
    check_request(Request("scan", "x", [], environment={"AWS_REGION": "eu-central-1"}), {"a": ["s3://bucket/x"]})


def test_what_is_too_large_to_travel_is_refused_by_its_key(tmp_path: Path) -> None:
    large = tmp_path / "large.jsonl"
    with large.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with refused(ConfigurationError, "dataset.source", says="large.jsonl: 100 MiB are too many to travel"):
        check_request(Request("scan", "x", [], {"dataset.source": large}), {})


def test_texts_arrive_at_the_cluster_as_they_were_typed(tmp_path: Path) -> None:
    typed = [
        "job.name=1e5",
        "model.revision=2026_11_25",
        "dataset.ids=[001,1e3]",
        "storage.uri=/r/é (1)=x",
        "job.limit=3",
    ]
    sent = shlex.split(Request("scan", "neg-x", as_typed(typed, ScanConfig, is_sweep=False)).entrypoint)[3:]
    # There they are read as here, and by Hydra as it is.
    for read in (compose_there(sent), composed("scan", sent, ScanConfig)):
        assert (read.job.name, read.model.revision, read.dataset.ids) == ("1e5", "2026_11_25", ["001", "1e3"])
        assert (read.storage.uri, read.job.limit) == ("/r/é (1)=x", 3)
    (tmp_path / "it's (1)").mkdir()
    with chdir(tmp_path):
        config = composed("scan", ["model.source=it's (1)"], ScanConfig)
        (said,) = _model_by_full_path(config)
    assert compose_there([said]).model.source == f"{tmp_path}/it's (1)"


def compose_there(overrides: list[str]) -> DictConfig:
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("scan", overrides=overrides)


@pytest.mark.parametrize("command", ["submit", "drain"])
def test_options_that_there_are_not_are_told_in_one_line(command: str) -> None:
    main = importlib.import_module(f"jobs.{command}").main
    for arguments in (["--nonsense"], ["--address"], ["--seconds=x", "--job=x"]):
        with refused(ConfigurationError, setting=None, says=r"(--|argument|arguments).*\(see --help\)"):
            main(arguments)
    with refused(ConfigurationError, says="nonsense"):
        main(["nonsense=1"])


def test_results_in_the_jobs_own_directory_are_refused() -> None:
    require_lasting("s3://bucket/runs")
    require_lasting("/mnt/runs")
    with refused(ConfigurationError, "storage.uri", "results", says="would lie in the job's own directory"):
        require_lasting("results")
    # What is extended is read on the cluster, too.
    config = composed("scan", ["storage.uri=/mnt/runs", "job.extend=results/run"], ScanConfig)
    with refused(ConfigurationError, "job.extend", "results/run", says="would lie in the job's own directory"):
        _planned(Namespace(job="scan", unchecked=True), config, "")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "127.0.0.1:6379"])
def test_no_job_server_at_the_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with refused(ConfigurationError, "--address", address, says="no job server answers|must be the job server"):
        main(["--address", address, "storage.uri=/tmp/x"])


def test_an_id_follows_what_decides_a_job_and_nothing_else(tmp_path: Path) -> None:
    words = tmp_path / "words.jsonl"

    def made(*overrides: str) -> str:
        with initialize_config_dir(CONF, version_base="1.3"):
            config = compose("scan", overrides=[f"dataset.source={words}", *overrides])
        return _submission_id("scan", None, config, {"dataset.source": words})

    words.write_text("one")
    first = made()
    assert made("job.progress_seconds=1", "cluster.replicas.max=3", "job.log=json") == first
    assert made("job.limit=3") != first
    # It would be taken for the scan that is done already.
    assert made("job.forecast=true") != first
    assert made("storage.uri=s3://elsewhere") != first
    words.write_text("two")
    assert made() != first


def test_a_driver_that_fits_no_node_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"CPU": 4.0, "memory": 8e9}, {"CPU": 2.0, "GPU": 1.0}]
    monkeypatch.setattr(submission, "_resources", lambda address: nodes)
    for fitting in ({}, {"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}):
        submission.check_driver("http://head", fitting)
    # There are four CPUs and a GPU, but not on one node.
    for too_much in ({"CPU": 4.0, "GPU": 1.0}, {"TPU": 1.0}):
        with refused(ConfigurationError, "--driver", says="no node has that; without --driver"):
            submission.check_driver("http://head", too_much)


def test_a_dry_run_shows_the_plan_here_and_sends_nothing(
    tmp_path: Path, tiny_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A client that can do nothing: any question to it would fail.
    monkeypatch.setattr(submission, "connect_to_job_server", lambda address: SimpleNamespace(_address="http://head"))
    monkeypatch.setattr(submission, "check_room", lambda *arguments: None)
    words = tmp_path / "words.jsonl"
    words.write_text('{"prompt": "w1 w2", "targets": [" w7"]}')
    asked = [f"model.source={tiny_directory}", f"dataset.source={words}", f"storage.uri={tmp_path}/runs"]
    assert main([*asked, "job.dry_run=true"]) == 0
    assert "plan (nothing was done)" in capsys.readouterr().out
    with refused(ConfigurationError, "job.dry_run", "true", says="the plan is made here, so leave out --unchecked"):
        main([*asked, "job.dry_run=true", "--unchecked"])


def test_a_job_that_waits_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    states = iter([JobStatus.PENDING] * 3 + [JobStatus.SUCCEEDED])

    class Waiting:
        _address = "http://head"

        def get_job_info(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(status=next(states), message="It may be waiting for resources", driver_exit_code=0)

        def get_job_logs(self, name: str) -> str:
            return ""

        async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
            return
            yield

    monkeypatch.setattr(submission, "_ASK_SECONDS", 0.01)
    monkeypatch.setattr(submission, "_WAITING_SECONDS", 0.0)
    with caplog.at_level("INFO"):
        assert submission.follow(Waiting(), "neg-x") == 0  # type: ignore[arg-type]
    assert "job neg-x waits: It may be waiting for resources" in caplog.text


@pytest.mark.parametrize("option", [["--driver", "CPU"], ["--driver", "CPU=x"], ["--env", "FOO"]])
def test_options_that_are_no_pairs_are_refused_before_a_server_is_asked(
    option: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "connect_to_job_server", lambda address: pytest.fail("asked"))
    with refused(ConfigurationError, option[0]):
        main(["--unchecked", "storage.uri=/tmp/x", *option])


class Flaky:
    """A job server whose answers fail now and then, and whose log breaks off."""

    _address = "http://nowhere"

    def __init__(self) -> None:
        self.questions = self.tails = 0

    def get_job_info(self, name: str) -> SimpleNamespace:
        self.questions += 1
        if self.questions in (1, 3):
            raise (requests.exceptions.ConnectionError("away"), RuntimeError("status code 502"))[self.questions // 2]
        status = JobStatus.RUNNING if self.questions < 5 else JobStatus.FAILED
        return SimpleNamespace(status=status, driver_exit_code=3, message="")

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        self.tails += 1
        yield "first line\n"
        if self.tails == 1:
            raise RuntimeError("broken off")
        yield "second line\n"

    def get_job_logs(self, name: str) -> str:
        return "first line\nsecond line\nlast line\n"


def test_a_job_is_followed_through_hiccups_and_its_log_is_printed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submission, "_ASK_SECONDS", 0.05)
    assert submission.follow(Flaky(), "neg-x") == 3  # type: ignore[arg-type]
    assert capsys.readouterr().out == "first line\nsecond line\nlast line\n"


def test_a_job_server_that_stays_away_is_given_up_with_word_that_the_job_may_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def away(self: Flaky, name: str) -> SimpleNamespace:
        raise requests.exceptions.ConnectionError("away")

    monkeypatch.setattr(Flaky, "get_job_info", away)
    monkeypatch.setattr(submission, "_ASK_SECONDS", 0.01)
    monkeypatch.setattr(submission, "_PATIENCE_SECONDS", 0.05)
    with refused(NegServiceError, setting=None, says="job neg-x may go on"):
        submission.follow(Flaky(), "neg-x")  # type: ignore[arg-type]


def test_only_what_is_seen_to_be_stored_is_complete(
    tmp_path: Path, tiny_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "words.jsonl").write_text('{"prompt": "w1 w2", "targets": [" w7"]}')
    config = ScanConfig(
        model=ModelConfig(str(tiny_directory)),
        dataset=DatasetConfig(str(tmp_path / "words.jsonl")),
        storage=StorageConfig(str(tmp_path / "runs#1")),
    )
    prepared = prepare(config)
    assert prepared.uri.startswith(f"{tmp_path}/runs#1/")
    assert not _is_complete(prepared)
    run = scan_here(config)
    assert _is_complete(prepared)
    # A store that cannot be asked has not said that all is there.
    for elsewhere in (StorageConfig("s3://runs/x", "http://127.0.0.1:9"), StorageConfig(f"{tmp_path}/words.jsonl/x")):
        uri = f"{elsewhere.uri}/{run.name}"
        unseen = replace(prepared, uri=uri, config=replace(config, storage=elsewhere))
        caplog.clear()
        assert not _is_complete(unseen)
        assert "cannot be seen from here" in caplog.text
    (Path(run.uri) / "run.json").unlink()
    assert not _is_complete(prepared)


@pytest.mark.parametrize("name", ["a b", "a'b", "a#1", "a=b", "caf\u00e9", "a\\b"])
def test_files_and_models_of_this_machine_are_named_as_they_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / f"{name}.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("scan", [setting("model.source", name), setting("dataset.source", f"{name}.jsonl")])
        (override,) = _model_by_full_path(config)
        assert compose("scan", [override]).model.source == str(tmp_path / name)
    assert _files(config) == {"dataset.source": tmp_path / f"{name}.jsonl"}
