"""What travels with a job and what must not: plain functions, no cluster."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from jobs.entry import CONF
from jobs.submit import main
from neg_service.cluster.prepare import require_lasting
from neg_service.cluster.submission import MOST_BYTES, Request, check_request, pack
from neg_service.errors import ConfigurationError


def test_code_configuration_and_named_files_travel_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "my words.jsonl").write_text("{}")
    (tmp_path / "wordings").mkdir()
    (tmp_path / "wordings" / "a.toml").write_text("")
    files = {"dataset.source": tmp_path / "my words.jsonl", "dataset.wordings": tmp_path / "wordings"}
    request = Request("scan", "neg-x", ["dataset.source=my words.jsonl", "job.limit=3"], files)
    target = tmp_path / "sent"
    target.mkdir()
    pack(request, Path(CONF).parent, target)
    assert sorted(path.name for path in target.iterdir()) == ["conf", "inputs", "jobs", "neg_service"]
    assert not list(target.rglob("__pycache__"))
    assert (target / "neg_service" / "prompts" / "wordings" / "agnews.toml").exists()
    assert sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) < 2 * 2**20
    command = shlex.split(request.entrypoint)
    assert command[:3] == ["python", "-m", "jobs.scan"]
    # What is named last holds: the place where the file will lie.
    assert command[-2:] == [
        "dataset.source=inputs/dataset.source/my-words.jsonl",
        "dataset.wordings=inputs/dataset.wordings/wordings",
    ]
    assert all((target / part.partition("=")[2]).exists() for part in command[-2:])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("scan", "x", ["dataset.source=https://me:secret@host/a.csv"]), "dataset.source: holds credentials"),
        (
            Request("scan", "x", ["dataset.source=https://host/a.csv?X-Amz-Signature=abc"]),
            "dataset.source: holds credentials",
        ),
        (
            Request("scan", "x", [], environment={"AWS_SECRET_ACCESS_KEY": "abc"}),
            "--env=AWS_SECRET_ACCESS_KEY: looks like a secret",
        ),
        (Request("scan", "x", [], environment={"HF_TOKEN": "abc"}), "--env=HF_TOKEN: looks like a secret"),
    ],
)
def test_secrets_do_not_travel_and_are_not_repeated(request_: Request, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_request(request_)
    assert message in str(caught.value)
    assert "secret@" not in str(caught.value)
    assert "abc" not in str(caught.value)


def test_what_is_too_large_to_travel_is_refused_by_its_key(tmp_path: Path) -> None:
    large = tmp_path / "large.jsonl"
    with large.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ConfigurationError, match=r"dataset.source=.*large.jsonl: 100 MiB are too many to travel"):
        check_request(Request("scan", "x", [], {"dataset.source": large}))


def test_results_in_the_jobs_own_directory_are_refused() -> None:
    require_lasting("s3://bucket/runs")
    require_lasting("/mnt/runs")
    with pytest.raises(ConfigurationError, match=r"storage.uri=results: would lie in the job's own directory"):
        require_lasting("results")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "127.0.0.1:6379"])
def test_no_job_server_at_the_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with pytest.raises(
        ConfigurationError, match=f"--address={address}: (no job server answers|must be the job server)"
    ):
        main(["--address", address, "storage.uri=/tmp/x"])
