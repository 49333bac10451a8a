"""S3 on a real server: objects, who may do what, and a scan whose results every reader loads from there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pyarrow.dataset
import pytest
import s3fs

import neg_service
from infra.s3.server import BUCKET, Keys, Server, server_on
from neg_service.errors import DestinationError, StorageError
from neg_service.storage.objects import open_store
from tests.e2e.commands import environment, job


def credentials(keys: Keys) -> dict[str, str]:
    return {"AWS_ACCESS_KEY_ID": keys.access_key, "AWS_SECRET_ACCESS_KEY": keys.secret_key, "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = server_on(tmp_path_factory.mktemp("s3"))
    started.start()
    yield started
    started.stop()
    assert started.pid is None


@pytest.fixture
def as_writer(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from _as(server.writer, monkeypatch)


@pytest.fixture
def as_reader(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from _as(server.reader, monkeypatch)


def _as(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in credentials(keys).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


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
def test_an_object_of_several_requests_comes_back_whole(server: Server) -> None:
    store = open_store(f"s3://{BUCKET}/large", server.endpoint_url)
    data = os.urandom(101 * 2**20)
    store.put("t/large", data)
    assert store.get("t/large") == data


@pytest.mark.usefixtures("as_reader")
def test_who_may_only_read_writes_nothing(server: Server) -> None:
    store = open_store(f"s3://{BUCKET}/objects", server.endpoint_url)
    assert store.list("none") == []
    with pytest.raises(DestinationError, match="Access Denied"):
        store.put("t/c", b"no")


@pytest.mark.usefixtures("as_writer")
def test_the_server_keeps_what_it_had_when_it_is_killed_and_started_again(tmp_path: Path) -> None:
    own = server_on(tmp_path / "s3")
    own.start()
    for name, value in credentials(own.writer).items():
        os.environ[name] = value
    s3fs.S3FileSystem.clear_instance_cache()
    store = open_store(f"s3://{BUCKET}/p", own.endpoint_url)
    store.put("t/a", b"kept")
    own.stop(9)
    with pytest.raises(StorageError):
        store.get("t/a")
    again = server_on(tmp_path / "s3")
    assert (again.endpoint_url, again.writer) == (own.endpoint_url, own.writer)
    again.start()
    assert store.get("t/a") == b"kept"
    again.stop()


@pytest.mark.ray
@pytest.mark.usefixtures("as_writer")
def test_a_scan_lands_in_s3_every_reader_loads_it_and_no_secret_is_anywhere(
    server: Server, tiny_directory: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"w1 w{i}", "targets": [" w3", " w4"], "id": f"p{i}"} for i in range(5)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    uri = f"s3://{BUCKET}/results"
    arguments = [f"model.source={tiny_directory}", f"dataset.source={tmp_path}/p.jsonl", f"storage.uri={uri}"]
    arguments += [f"storage.endpoint_url={server.endpoint_url}", "job.shard_size=2"]
    done = job("scan", *arguments, env=environment(**credentials(server.writer)))
    assert done.returncode == 0, done.stderr
    files = s3fs.S3FileSystem(endpoint_url=server.endpoint_url)
    (place,) = files.ls(f"{BUCKET}/results")
    run = neg_service.open_run(f"s3://{place}", server.endpoint_url)
    assert run.done() == {0, 1, 2}
    assert run.table("neurgrad").to_table().num_rows == 5 * 2 * 3

    options = {"endpoint_url": server.endpoint_url}
    assert len(pd.read_parquet(f"s3://{place}/neurgrad", storage_options=options)) == 30
    polars_options = {name.lower(): value for name, value in credentials(server.writer).items()}
    polars_options["aws_endpoint_url"] = server.endpoint_url
    assert pl.scan_parquet(f"s3://{place}/neurgrad/*.parquet", storage_options=polars_options).collect().height == 30
    assert pyarrow.dataset.dataset(f"{place}/neurgrad", filesystem=files).count_rows() == 30
    duckdb.register_filesystem(files)
    ((count,),) = duckdb.sql(f"select count(*) from 's3://{place}/neurgrad/*.parquet'").fetchall()
    assert count == 30

    again = job("scan", *arguments, env=environment(**credentials(server.writer)))
    assert "this run was finished already" in again.stdout
    everything = [done.stdout, done.stderr, again.stdout, again.stderr]
    everything += [files.cat_file(name).decode("latin-1") for name in files.find(place)]
    for secret in (server.writer.secret_key, server.writer.access_key):
        assert all(secret not in text for text in everything)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("keys", "bucket", "message"),
    [
        (Keys("a" * 20, "b" * 40), BUCKET, "access key ID you provided does not exist"),
        ("reader", BUCKET, "Access Denied"),
    ],
    ids=["wrong key", "read-only key"],
)
def test_what_cannot_be_written_is_one_clear_line(
    keys: Keys | str, bucket: str, message: str, server: Server, tiny_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "w1", "targets": [" w2"]}\n')
    used = getattr(server, keys) if isinstance(keys, str) else keys
    arguments = [f"model.source={tiny_directory}", f"dataset.source={tmp_path}/p.jsonl"]
    arguments += [f"storage.uri=s3://{bucket}/refused", f"storage.endpoint_url={server.endpoint_url}"]
    done = job("scan", *arguments, env=environment(**credentials(used)))
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in error
    assert "Traceback" not in done.stderr
    assert used.secret_key not in done.stdout + done.stderr
    assert "replica 0 is ready" not in done.stderr
