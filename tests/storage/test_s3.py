"""S3 on a real server: objects, who may do what, places that are none, and what is read from a bucket."""

from __future__ import annotations

import dataclasses
import datetime
import http.server
import os
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import botocore.auth
import pyarrow as pa
import pytest
import s3fs

from infra.s3.server import BUCKET, Keys, Server, server_on
from neg_service.config import DatasetConfig, NeuronsConfig
from neg_service.errors import DestinationError, PromptError, StorageError
from neg_service.measures.choice import with_list_read
from neg_service.prompts.mceval8k import load_tasks
from neg_service.prompts.tasks import TASKS
from neg_service.storage import waiting
from neg_service.storage.parts import encode_part, part_key
from neg_service.storage.retries import RetryingStore
from neg_service.storage.run import write_or_match
from neg_service.storage.s3 import S3Store
from neg_service.storage.stores import open_store
from tests.faults.proxy import Proxy, Seen
from tests.refusals import ANY, refused
from tests.s3 import acting_as
from tests.skills import published_row, write_split


@pytest.mark.usefixtures("as_writer")
def test_objects_are_put_replaced_listed_and_deleted(server: Server) -> None:
    store = open_store(f"s3://{BUCKET}/objects", server.endpoint_url)
    assert store.get("t/a") is None
    assert store.list("t") == []
    store.put("t/a", b"one")
    store.put("t/a", b"two")
    store.put("t/b", b"")
    assert (store.get("t/a"), store.get("t/b")) == (b"two", b"")
    assert [(entry.key, entry.size) for entry in store.list("t")] == [("t/a", 3), ("t/b", 0)]
    assert [entry.key for entry in store.list("")] == ["t/a", "t/b"]
    assert abs(store.list("t")[0].modified - time.time()) < 60
    store.delete("t/a")
    store.delete("t/a")
    assert [entry.key for entry in store.list("t")] == ["t/b"]


@pytest.mark.usefixtures("as_writer")
def test_an_object_that_comes_while_a_folder_is_listed_harms_nothing(server: Server) -> None:
    direct = open_store(f"s3://{BUCKET}/coming", server.endpoint_url)

    def decide(request: Seen) -> str | None:
        # What s3fs asks after a listing that was empty.
        if request.method == "HEAD":
            direct.put("t/a", b"new")
        return None

    with Proxy(server.endpoint_url, decide) as proxy:
        store = open_store(f"s3://{BUCKET}/coming", proxy.url)
        assert store.list("t") == []
        assert [entry.key for entry in store.list("t")] == ["t/a"]


@pytest.mark.usefixtures("as_writer")
def test_an_object_of_several_requests_comes_back_whole(server: Server) -> None:
    store = open_store(f"s3://{BUCKET}/large", server.endpoint_url)
    data = os.urandom(101 * 2**20)
    store.put("t/large", data)
    assert store.get("t/large") == data


@pytest.mark.usefixtures("as_writer")
def test_an_abandoned_upload_is_never_seen_and_is_aborted_when_it_is_old(server: Server) -> None:
    store = open_store(f"s3://{BUCKET}/abandoned", server.endpoint_url)
    client = s3fs.S3FileSystem(endpoint_url=server.endpoint_url)
    what = {"Bucket": BUCKET, "Key": "abandoned/t/shard-000000.parquet"}
    upload = client.call_s3("create_multipart_upload", **what)["UploadId"]
    client.call_s3("upload_part", **what, UploadId=upload, PartNumber=1, Body=b"x" * 5 * 2**20)
    assert store.list("") == []
    assert store.get("t/shard-000000.parquet") is None
    # It may be somebody's who is still at it.
    assert store.clear_unfinished() == 0
    assert store.clear_unfinished(older_than_seconds=0) == 1
    assert store.clear_unfinished(older_than_seconds=0) == 0
    assert "Uploads" not in client.call_s3("list_multipart_uploads", Bucket=BUCKET)


@pytest.mark.usefixtures("as_writer")
def test_the_reply_to_a_completed_upload_is_lost(server: Server) -> None:
    lost: list[str] = []

    def decide(request: Seen) -> str | None:
        # The last request of an upload in several parts.
        if request.method == "POST" and "uploadId=" in request.path and not lost:
            lost.append(request.path)
            return "lost reply"
        return None

    data = os.urandom(101 * 2**20)
    with Proxy(server.endpoint_url, decide) as proxy:
        open_store(f"s3://{BUCKET}/lost", proxy.url, retry_timeout_seconds=60).put("t/large", data)
    assert lost
    store = open_store(f"s3://{BUCKET}/lost", server.endpoint_url)
    assert store.get("t/large") == data
    assert store.clear_unfinished(older_than_seconds=0) == 0


def test_who_may_only_read_writes_nothing(server: Server) -> None:
    with acting_as(server.reader):
        store = open_store(f"s3://{BUCKET}/objects", server.endpoint_url)
        assert store.list("none") == []
        with refused(DestinationError, "storage.uri", says="Access Denied"):
            store.put("t/c", b"no")


@pytest.mark.faults
@pytest.mark.usefixtures("as_writer")
def test_the_server_keeps_what_it_had_when_it_is_killed_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = server_on(tmp_path / "s3")
    own.start()
    with acting_as(own.writer), ExitStack() as ended:
        ended.callback(own.stop, 9)
        store = open_store(f"s3://{BUCKET}/p", own.endpoint_url)
        store.put("t/a", b"kept")
        own.stop(9)
        monkeypatch.setattr(waiting, "SECONDS_WITHOUT_RETRIES", 1.0)
        with pytest.raises(StorageError):
            store.get("t/a")
        again = server_on(tmp_path / "s3")
        assert (again.endpoint_url, again.writer) == (own.endpoint_url, own.writer)
        # Who is patient does not notice.
        starting = threading.Timer(1, again.start)
        ended.callback(again.stop)
        ended.callback(starting.join)
        starting.start()
        assert RetryingStore(store, 60).get("t/a") == b"kept"


class _Page(http.server.BaseHTTPRequestHandler):
    """A web server that is not S3, and answers everything with a page."""

    status = 200

    def do_GET(self) -> None:
        page = b"<!DOCTYPE html><html><body>Please sign in</body></html>"
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        if self.status == 302:
            self.send_header("Location", "/login")
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    do_PUT = do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.usefixtures("as_writer")
@pytest.mark.parametrize("status", [200, 403, 404, pytest.param(302, marks=pytest.mark.faults)])
def test_an_endpoint_that_answers_with_a_page_is_no_s3_server(status: int) -> None:
    handler = type("Page", (_Page,), {"status": status})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        with refused(DestinationError, "storage.uri", says=r"not as an S3 server does; check storage\.endpoint_url"):
            S3Store("s3://runs/x", f"http://127.0.0.1:{web.server_address[1]}").check()
        web.shutdown()


@pytest.mark.usefixtures("as_writer")
def test_an_endpoint_that_never_replies_is_told_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SECONDS_WITHOUT_RETRIES", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        began = time.monotonic()
        with refused(StorageError, "storage.uri", says=r"storage\.endpoint_url=http://127\.0\.0\.1:\d+.*[Tt]ime"):
            S3Store("s3://runs/x", f"http://127.0.0.1:{mute.getsockname()[1]}").check()
        assert time.monotonic() - began < 120


@pytest.mark.usefixtures("as_writer")
@pytest.mark.parametrize(
    ("uri", "endpoint_url", "refusal"),
    [
        (
            "s3://nobody-made-this/x",
            None,
            ("storage.uri", ANY, "storage.uri=s3://nobody-made-this/x.*bucket does not exist"),
        ),
        (
            "s3://runs/x",
            "http://127.0.0.1:1",
            ("storage.uri", ANY, "127.0.0.1:1.: no server answers there: Connection refused"),
        ),
        ("s3://runs/x", "http://no-such-host.invalid:80", ("storage.uri", ANY, "no server answers there: .*[Nn]ame")),
        ("s3://runs/x", "127.0.0.1:8333", ("storage.uri", ANY, "is no URL of a server; give http://HOST:PORT")),
    ],
)
def test_a_place_that_is_none_is_told_at_once(
    uri: str, endpoint_url: str | None, refusal: tuple[Any, ...], server: Server
) -> None:
    began = time.monotonic()
    with refused(DestinationError, *refusal):
        S3Store(uri, endpoint_url or server.endpoint_url).check()
    assert time.monotonic() - began < 60


@pytest.mark.usefixtures("as_writer")
def test_tasks_are_read_from_a_bucket(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint_url)
    # fsspec remembers the instance that it made for another endpoint.
    s3fs.S3FileSystem.clear_instance_cache()
    rows = [published_row("agnews", number) for number in range(12)]
    write_split(tmp_path, "agnews", "valid", rows)
    store = open_store(f"s3://{BUCKET}/data", server.endpoint_url)
    store.put(TASKS["agnews"].path("valid"), (tmp_path / TASKS["agnews"].path("valid")).read_bytes())
    asked = DatasetConfig(source=f"s3://{BUCKET}/data", task="agnews")
    assert load_tasks(asked) == load_tasks(dataclasses.replace(asked, source=str(tmp_path)))
    with refused(PromptError, "dataset.source", says="agnews has no split test .*; there is valid"):
        load_tasks(dataclasses.replace(asked, split="test"))


@pytest.mark.usefixtures("as_writer")
@pytest.mark.parametrize("name", ["results[1]", "a*b", "{x}", "a b"])
def test_a_list_is_a_folder_of_any_name_in_a_bucket(server: Server, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint_url)
    s3fs.S3FileSystem.clear_instance_cache()
    for shard, folder in enumerate((name, name, "results1", "axb", "x")):
        table = pa.table({"layer": [2 if folder == name else 9], "neuron": [shard]})
        store = open_store(f"s3://{BUCKET}/lists/{folder}", server.endpoint_url)
        store.put(part_key("sweep", shard), encode_part("sweep", table, "f", shard))
    asked = NeuronsConfig(choose="list", list=f"s3://{BUCKET}/lists/{name}/sweep")
    assert with_list_read(asked).list.tolist() == [[2, 0], [2, 1]]
    one = dataclasses.replace(asked, list=f"{asked.list}/shard-000001.parquet")
    assert with_list_read(one).list.tolist() == [[2, 1]]


def test_a_uri_without_a_bucket_is_refused() -> None:
    with refused(DestinationError, "storage.uri", says="names no bucket"):
        open_store("s3:///x")


@pytest.mark.usefixtures("as_writer")
@pytest.mark.parametrize("hours", [-3, 3])
def test_a_clock_that_is_off_is_named(hours: int, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    now = botocore.auth.get_current_datetime
    later = datetime.timedelta(hours=hours)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *a, **k: now(*a, **k) + later)
    s3fs.S3FileSystem.clear_instance_cache()
    with refused(DestinationError, "storage.uri", says="too large: set this machine's clock"):
        S3Store(f"s3://{BUCKET}/x", server.endpoint_url).check()


@pytest.mark.parametrize(
    ("keys", "refusal"),
    [
        (Keys("a" * 20, "b" * 40), ("storage.uri", ANY, "access key ID you provided does not exist")),
        (None, ("storage.uri", ANY, "Unable to locate credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")),
    ],
    ids=["wrong key", "no key"],
)
def test_a_key_that_is_none_is_told_in_one_line(
    keys: Keys | None, refusal: tuple[Any, ...], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with acting_as(keys), refused(DestinationError, *refusal) as error:
        S3Store(f"s3://{BUCKET}/x", server.endpoint_url).check()
    assert "b" * 40 not in str(error.value)


def test_a_wrong_secret_is_told_without_it(server: Server) -> None:
    wrong = Keys(server.writer.access_key, "c" * 40)
    with acting_as(wrong), pytest.raises(DestinationError) as error:
        S3Store(f"s3://{BUCKET}/x", server.endpoint_url).check()
    assert "signature" in str(error.value)
    assert "c" * 40 not in str(error.value)


@pytest.mark.usefixtures("as_writer")
def test_a_prefix_that_holds_something_else_is_refused(server: Server) -> None:
    store = open_store(f"s3://{BUCKET}/taken", server.endpoint_url)
    store.put("holiday/photo.jpg", b"...")
    with refused(DestinationError, setting=None, says=r"holds holiday/photo\.jpg but no run\.json"):
        write_or_match(store, {"plan": {}}, {}, {})
