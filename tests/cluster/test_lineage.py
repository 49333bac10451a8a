"""OpenLineage events at a real server on loopback and in a file; those of a scan on Ray: `tests/infra`."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from neg_service.cluster.lineage import RunEvents
from neg_service.cluster.lineage_events import dataset_name
from neg_service.cluster.prepare import prepare
from neg_service.cluster.scan import run
from neg_service.config import ScanConfig, typed
from neg_service.errors import ConfigurationError, NegServiceError, StorageError
from neg_service.storage.run import Snapshot
from tests.here import run_here
from tests.lineage import Server, planned, require_valid, words_of
from tests.refusals import refused


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


@pytest.fixture
def asked(tiny_directory: Path, tmp_path: Path) -> dict[str, Any]:
    return words_of(tiny_directory, tmp_path)


def test_each_start_is_a_run_of_the_same_job_also_where_nothing_is_left_to_do(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    prepared = planned(asked, f"file://{tmp_path}/events.jsonl")
    done = run_here(prepared)
    assert [run(prepared).shards_done for _ in range(2)] == [2, 2]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    for event in events:
        require_valid(event)
    assert [event["eventType"] for event in events] == ["START", "COMPLETE"] * 2
    first, second = ({event["run"]["runId"] for event in events[i : i + 2]} for i in (0, 2))
    assert len(first) == len(second) == 1 < len(first | second)
    assert {event["job"]["name"] for event in events} == {"mine"}
    stored = [one["outputFacets"]["outputStatistics"] for one in events[-1]["outputs"]]
    assert sum(one["size"] for one in stored) == done.bytes_now


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (StorageError("no answer from http://me:abcdefgh1@host"), "FAIL", "no answer from http://***@host"),
        (RuntimeError("odd\nmore"), "FAIL", "RuntimeError: odd"),
        (KeyboardInterrupt(), "ABORT", "interrupted or stopped"),
        (SystemExit(15), "ABORT", "interrupted or stopped"),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, BaseException) else None,
)
def test_a_scan_says_how_it_failed(
    asked: dict[str, Any], server: Server, error: BaseException, state: str, said: str
) -> None:
    with pytest.raises(type(error)), RunEvents(planned(asked, server.url)):
        raise error
    start, end = server.events
    assert (start["eventType"], end["eventType"]) == ("START", state)
    require_valid(end)
    assert end["run"]["facets"]["errorMessage"]["message"] == said


def test_a_scan_whose_shards_failed_has_failed(asked: dict[str, Any], server: Server) -> None:
    with RunEvents(planned(asked, f"{server.url}/own/path")) as lineage:
        lineage.done(shards=1, prompts=2, n_bytes=9, failed={1: "NaN"}, at=_away)
    end = server.events[-1]
    require_valid(end)
    assert (end["eventType"], server.asked[-1][0]) == ("FAIL", "/own/path")
    assert end["run"]["facets"]["errorMessage"]["message"] == "1 shards failed, shard 1 with: NaN"
    assert end["run"]["facets"]["neg_service"]["shards_done"] == 1


def test_a_store_that_is_away_at_the_end_is_not_waited_for(
    asked: dict[str, Any], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neg_service.cluster.lineage._LAST_SECONDS", 0.2)
    over = threading.Event()

    def at() -> Snapshot:
        over.wait(5)
        raise StorageError("away")

    with RunEvents(planned(asked, server.url)) as events:
        began = time.monotonic()
        events.done(shards=2, prompts=3, n_bytes=9, failed={}, at=at)
        assert time.monotonic() - began < 2
    over.set()


def _away() -> Snapshot:
    raise StorageError("away")


@contextmanager
def silent() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def closed() -> Iterator[str]:
    """A port on which nobody listens."""
    yield "http://127.0.0.1:9"


@pytest.mark.parametrize("server_that_is", [closed, silent])
def test_a_server_that_is_away_costs_a_warning(
    asked: dict[str, Any], server_that_is: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with server_that_is() as url, caplog.at_level(logging.WARNING, "neg_service"):
        lineage = RunEvents(planned(asked, url))
        began = time.monotonic()
        with lineage:
            assert time.monotonic() - began < 1
            lineage.done(shards=2, prompts=3, n_bytes=9, failed={}, at=_away)
        assert time.monotonic() - began < 7
    told = [one.getMessage() for one in caplog.records if one.name == "neg_service.cluster.lineage"]
    assert len(told) == 1
    assert told[0].startswith(f"job.lineage={url}: lineage is not told, the scan goes on")


def test_what_is_no_place_for_events_is_refused_before_anything_is_done(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, says in [
        (f"{tmp_path}/nowhere/events.jsonl", "No such file"),
        (f"{tmp_path}/file/events.jsonl", "Not a directory"),
        (str(tmp_path), "Is a directory"),
        ("kafka://host/topic", "must be an http"),
        ("http://", "give http"),
        ("https://host/x?api_key=hidden", "OPENLINEAGE_API_KEY"),
        ("http://me:hidden@host", "holds credentials"),
        ("http://host:port", "no URL of a server"),
        ("http://h:99999/x#hidden", "no URL of a server"),
        ("http://[::1?api_key=hidden", "no URL of a server"),
        ("http://me:hidden@host", "as OPENLINEAGE_API_KEY"),
        ("http:// h", "give http"),
        ("127.0.0.1:5000", "http://HOST:PORT"),
        ("http:127.0.0.1:5000", "http://HOST:PORT"),
        ("false", "must be"),
    ]:
        with refused(ConfigurationError, "job.lineage", says=says) as caught:
            run(planned(asked, place))
        assert "hidden" not in str(caught.value)
    assert not (tmp_path / "results").exists()


def test_what_is_refused_without_a_model_and_without_a_look_at_it(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before the model is looked for, of which there is none.
    asked = {**asked, "model": {"source": str(tmp_path / "nowhere")}}
    os.mkfifo(tmp_path / "pipe")
    with refused(ConfigurationError, "job.lineage", says="not a pipe"):
        planned(asked, str(tmp_path / "pipe"))
    own = tmp_path / "_ray_pkg_0123"
    own.mkdir()
    monkeypatch.chdir(own)
    with refused(ConfigurationError, "job.lineage", "events.jsonl", says="would lie in the job's own directory"):
        planned(asked, "events.jsonl")
    monkeypatch.setenv("OPENLINEAGE_DISABLED", "true")
    with refused(ConfigurationError, "job.lineage", says="OPENLINEAGE_DISABLED"):
        planned(asked, "http://127.0.0.1:9")


def test_files_of_the_working_folder_and_other_variables_decide_nothing(
    asked: dict[str, Any], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "openlineage.yml").write_text("- odd\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENLINEAGE__FILTERS", "{bad")
    monkeypatch.setenv("OPENLINEAGE_API_KEY", "abcdefgh1234\n")
    with RunEvents(planned(asked, server.url)):
        pass
    assert [event["eventType"] for event in server.events] == ["START", "COMPLETE"]
    assert {key for _, key in server.asked} == {"Bearer abcdefgh1234"}


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("facts", ("neg_service", "facts")),
        ("smollm2", ("neg_service", "smollm2")),
        ("/data/a.jsonl", ("file", "/data/a.jsonl")),
        ("file://localhost/a", ("file", "/a")),
        ("zip://a.jsonl::https://h/x.zip", ("https://h", "x.zip")),
        ("simplecache::s3://bucket/a/b.jsonl", ("s3://bucket", "a/b.jsonl")),
        ("org/model", ("hub", "org/model")),
    ],
)
def test_inputs_are_named_where_they_are(place: str, expected: tuple[str, str]) -> None:
    assert dataset_name(place) == expected


def test_who_lacks_the_extra_is_told_its_name(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openlineage.client.transport.http", None)
    with refused(ConfigurationError, "job.lineage", says="the extra `lineage`"):
        RunEvents(planned(asked, f"{tmp_path}/events.jsonl"))


def test_without_a_place_nothing_is_sent(asked: dict[str, Any]) -> None:
    with pytest.raises(NegServiceError), RunEvents(prepare(typed(ScanConfig, asked))):
        raise NegServiceError("odd")
