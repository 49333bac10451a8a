"""S3 on a real server: objects, who may do what, places that are none, and results that every reader loads."""

from __future__ import annotations

import dataclasses
import datetime
import http.server
import json
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import botocore.auth
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray
import s3fs

import neg_service
from infra.s3.server import BUCKET, Keys, Server, server_on
from jobs.entry import composed
from jobs.scan import scan
from neg_service import schema
from neg_service.config import DatasetConfig, NeuronsConfig, ScanConfig
from neg_service.errors import DestinationError, PromptError, StorageError
from neg_service.measures.choice import with_list_read
from neg_service.prompts.mceval8k import load_tasks
from neg_service.prompts.tasks import TASKS
from neg_service.storage import waiting
from neg_service.storage.parts import encode_part, part_key
from neg_service.storage.patience import PatientStore
from neg_service.storage.run import write_or_match
from neg_service.storage.s3 import S3Store
from neg_service.storage.stores import open_store
from tests.e2e.commands import ROOT, environment, job, refused, scan_config
from tests.faults.proxy import Proxy, Seen
from tests.here import scan_here
from tests.s3 import acting_as, credentials
from tests.skills import published_row, write_split


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = server_on(tmp_path_factory.mktemp("s3"))
    started.start()
    yield started
    started.stop()
    assert started.pid is None


@pytest.fixture
def as_writer(server: Server) -> Iterator[None]:
    with acting_as(server.writer):
        yield


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
        open_store(f"s3://{BUCKET}/lost", proxy.url, patience_seconds=60).put("t/large", data)
    assert lost
    store = open_store(f"s3://{BUCKET}/lost", server.endpoint_url)
    assert store.get("t/large") == data
    assert store.clear_unfinished(older_than_seconds=0) == 0


def test_who_may_only_read_writes_nothing(server: Server) -> None:
    with acting_as(server.reader):
        store = open_store(f"s3://{BUCKET}/objects", server.endpoint_url)
        assert store.list("none") == []
        with pytest.raises(DestinationError, match="Access Denied"):
            store.put("t/c", b"no")


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
        monkeypatch.setattr(waiting, "HASTY_SECONDS", 1.0)
        with pytest.raises(StorageError):
            store.get("t/a")
        again = server_on(tmp_path / "s3")
        assert (again.endpoint_url, again.writer) == (own.endpoint_url, own.writer)
        # Who is patient does not notice.
        starting = threading.Timer(1, again.start)
        ended.callback(again.stop)
        ended.callback(starting.join)
        starting.start()
        assert PatientStore(store, 60).get("t/a") == b"kept"


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
        with pytest.raises(DestinationError, match=r"not as an S3 server does; check storage\.endpoint_url"):
            S3Store("s3://runs/x", f"http://127.0.0.1:{web.server_address[1]}").check()
        web.shutdown()


@pytest.mark.usefixtures("as_writer")
def test_an_endpoint_that_never_replies_is_told_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "HASTY_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        began = time.monotonic()
        with pytest.raises(StorageError, match=r"storage\.endpoint_url=http://127\.0\.0\.1:\d+.*[Tt]ime"):
            S3Store("s3://runs/x", f"http://127.0.0.1:{mute.getsockname()[1]}").check()
        assert time.monotonic() - began < 120


@pytest.mark.usefixtures("as_writer")
@pytest.mark.parametrize(
    ("uri", "endpoint_url", "message"),
    [
        ("s3://nobody-made-this/x", None, "storage.uri=s3://nobody-made-this/x.*bucket does not exist"),
        ("s3://runs/x", "http://127.0.0.1:1", "127.0.0.1:1.: no server answers there: Connection refused"),
        ("s3://runs/x", "http://no-such-host.invalid:80", "no server answers there: .*[Nn]ame"),
        ("s3://runs/x", "127.0.0.1:8333", "is no URL of a server; give http://HOST:PORT"),
    ],
)
def test_a_place_that_is_none_is_told_at_once(uri: str, endpoint_url: str | None, message: str, server: Server) -> None:
    began = time.monotonic()
    with pytest.raises(DestinationError, match=message) as error:
        S3Store(uri, endpoint_url or server.endpoint_url).check()
    assert "\n" not in str(error.value)
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
    with pytest.raises(PromptError, match=r"s3://runs/data: agnews has no split test .*; there is valid"):
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
    assert with_list_read(asked).list == [[2, 0], [2, 1]]
    one = dataclasses.replace(asked, list=f"{asked.list}/shard-000001.parquet")
    assert with_list_read(one).list == [[2, 1]]


def test_a_uri_without_a_bucket_is_refused() -> None:
    with pytest.raises(DestinationError, match=r"storage\.uri=s3:///x: names no bucket"):
        open_store("s3:///x")


@pytest.mark.usefixtures("as_writer")
@pytest.mark.parametrize("hours", [-3, 3])
def test_a_clock_that_is_off_is_named(hours: int, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    now = botocore.auth.get_current_datetime
    later = datetime.timedelta(hours=hours)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *a, **k: now(*a, **k) + later)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DestinationError, match="too large: set this machine's clock"):
        S3Store(f"s3://{BUCKET}/x", server.endpoint_url).check()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (Keys("a" * 20, "b" * 40), "access key ID you provided does not exist"),
        (None, "Unable to locate credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ],
    ids=["wrong key", "no key"],
)
def test_a_key_that_is_none_is_told_in_one_line(
    keys: Keys | None, message: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with acting_as(keys), pytest.raises(DestinationError, match=message) as error:
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
    with pytest.raises(DestinationError, match=r"holds holiday/photo\.jpg but no run\.json"):
        write_or_match(store, {"plan": {}}, {}, {})


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"w1 w{i}", "targets": [" w3", " w4"], "answer": " w3", "id": f"p{i}"} for i in range(5)]
    path = tmp_path_factory.mktemp("data") / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def scanned(server: Server, tiny_directory: Path, words: Path) -> tuple[str, list[str], list[str]]:
    """The URI of a finished run, the settings of its scan, and all that was printed."""
    arguments = [f"model.source={tiny_directory}", f"dataset.source={words}", f"storage.uri=s3://{BUCKET}/results"]
    arguments += [f"storage.endpoint_url={server.endpoint_url}", "cluster.replicas=1", "job.shard_size=2"]
    done = job("scan", *arguments, env=environment(**credentials(server.writer)))
    assert done.returncode == 0, done.stderr
    (uri,) = re.findall(r"results +(s3://\S+)", done.stdout)
    return uri, arguments, [done.stdout, done.stderr]


@pytest.mark.ray
@pytest.mark.usefixtures("as_writer")
def test_a_scan_lands_in_s3_and_no_secret_is_anywhere(
    scanned: tuple[str, list[str], list[str]], server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    uri, arguments, printed = scanned
    began = time.time()
    assert f'open_run("{uri}", "{server.endpoint_url}")' in printed[0]
    run = neg_service.open_run(uri, server.endpoint_url)
    assert run.done() == {0, 1, 2}
    assert run.table("neurgrad").to_table().num_rows == 5 * 2 * 3
    assert scan(composed("scan", arguments, ScanConfig)) == 0
    again = capfd.readouterr()
    assert "this run was finished already" in again.out
    env = environment(**credentials(server.writer))
    where = [f"run={uri}", f"storage.endpoint_url={server.endpoint_url}"]
    asked = [job(name, *where, env=env) for name in ("status", "verify")]
    assert [one.returncode for one in asked] == [0, 0]
    everything = [*printed, *again, *(text for one in asked for text in (one.stdout, one.stderr))]
    store = open_store(uri, server.endpoint_url)
    everything += [(store.get(entry.key) or b"").decode("latin-1") for entry in store.list("")]
    # What Ray keeps of its processes, too.
    sessions = Path(tempfile.gettempdir(), "ray").glob("session_2*/logs/**/*")
    everything += [log.read_text(errors="replace") for log in sessions if log.is_file() and _is_recent(log, began)]
    for secret in (server.writer.secret_key, server.writer.access_key):
        assert all(secret not in text for text in everything)


WRONG = Keys("a" * 20, "b" * 40)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("who", "bucket", "message"),
    [
        ("reader", BUCKET, "Access Denied"),
        ("writer", "nobody-made-this", "bucket does not exist"),
        ("nobody", BUCKET, "access key ID you provided does not exist"),
    ],
)
def test_what_cannot_be_written_is_one_clear_line_before_a_model_is_loaded(
    who: str,
    bucket: str,
    message: str,
    server: Server,
    tiny_directory: Path,
    words: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments = [f"model.source={tiny_directory}", f"dataset.source={words}"]
    arguments += [f"storage.uri=s3://{bucket}/refused", f"storage.endpoint_url={server.endpoint_url}"]
    used = getattr(server, who, WRONG)
    with acting_as(used), pytest.raises(DestinationError) as caught:
        scan(composed("scan", arguments, ScanConfig))
    assert message in str(caught.value)
    assert f"storage.uri=s3://{bucket}/refused" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert used.secret_key not in str(caught.value) + "".join(capfd.readouterr()) + caplog.text
    # No cluster was begun for it.
    assert not ray.is_initialized()
    with acting_as(server.writer):
        assert not s3fs.S3FileSystem(endpoint_url=server.endpoint_url).exists(f"{bucket}/refused")


@pytest.mark.usefixtures("as_writer")
def test_one_neuron_costs_the_bytes_of_one_layer(server: Server) -> None:
    # 30 prompts, ten layers of 5,000 neurons: 600 kB a layer.
    values = np.random.default_rng(0).standard_normal(30 * 10 * 5000).astype(np.float32)
    rows = {"prompt_id": [f"p{i // 10}" for i in range(300)], "layer": [*range(10)] * 30, "basis": ["paper"] * 300}
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values), 5000)
    table = pa.Table.from_arrays([*map(pa.array, rows.values()), lists], names=[*rows, "activation"])
    table = table.cast(schema.activations(5000))
    identity = {"plan": {"shards": 1, "shard_size": 1}}
    store = open_store(f"s3://{BUCKET}/layers", server.endpoint_url)
    run = write_or_match(store, identity, {"activations": table.schema}, {})
    data = encode_part("activations", table, run.fingerprint, 0)
    store.put(part_key("activations", 0), data)
    with Proxy(server.endpoint_url) as proxy:
        opened = neg_service.open_run(f"s3://{BUCKET}/layers", proxy.url)
        found = opened.neuron(7, 1234)
        assert found["activation"].to_pylist() == [values[(i * 10 + 7) * 5000 + 1234] for i in range(30)]
        (read,) = [size for path, size in proxy.sent.items() if path.endswith(".parquet")]
        # The layer's chunk, and the end of the object, which is read once in 64 kB to find the footer.
        assert len(data) / 11 < read < len(data) / 10 + 2**16 + 20_000
        proxy.sent.clear()
        opened.table("activations", columns=["prompt_id"], filter=pc.field("layer") == 3).to_table()
        (read,) = [size for path, size in proxy.sent.items() if path.endswith(".parquet")]
        assert read < 2**16 + 20_000


def _is_recent(file: Path, began: float) -> bool:
    return file.stat().st_mtime > began - 300


@pytest.mark.ray
@pytest.mark.usefixtures("as_writer")
def test_resuming_refuses_what_would_begin_another_run(scanned: tuple[str, list[str], list[str]]) -> None:
    uri, arguments, _ = scanned
    refused(
        'belongs to another configuration: model.dtype: "float32" there, "bfloat16" asked; ask for the same, or use',
        *arguments, f"job.resume={uri}", "model.dtype=bfloat16",
    )  # fmt: skip
    refused("plan.shard_size: 2 there, 4 asked", *arguments[:-1], f"job.resume={uri}", "job.shard_size=4")


@pytest.mark.ray
@pytest.mark.usefixtures("as_writer")
def test_the_recipes_of_the_readme_run_as_they_stand(
    scanned: tuple[str, list[str], list[str]], server: Server, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a scan reads may lie there too: the prompts, and the neurons, as a table of an earlier one.
    open_store(f"s3://{BUCKET}", server.endpoint_url).put("words.jsonl", words.read_bytes())
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint_url)
    s3fs.S3FileSystem.clear_instance_cache()
    top = ["measure.keep=top_k", "measure.top_k=3"]
    kept = scan_here(scan_config(*scanned[1], f"dataset.source=s3://{BUCKET}/words.jsonl", *top))
    sweep = ["measure=sweep", "neurons=list", f"neurons.list={kept.uri}/top_neurons", "measure.grid=coarse"]
    sweep_uri = scan_here(scan_config(*scanned[1], *sweep)).uri
    readme = (ROOT / "neg_service" / "storage" / "README.md").read_text()
    given = {"uri": scanned[0], "endpoint_url": server.endpoint_url, "sweep_uri": sweep_uri}
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        code = re.sub(r"^layer, neuron = .*$", "layer, neuron = 1, 7", block, flags=re.MULTILINE)
        for name, value in given.items():
            code = re.sub(rf"^{name} = .*$", f"{name} = {value!r}", code, flags=re.MULTILINE)
        exec(code, names)
    # Five prompts, two targets; one layer of three.
    assert names["matrix"].shape == (5 * 3, 40)  # type: ignore[attr-defined]
    assert len(names["one"]) == len(names["rows"]) == len(names["frame"]) == 10  # type: ignore[arg-type]
    assert names["table"].num_rows == 30  # type: ignore[attr-defined]
    mine = {(row.prompt_id, row.target): row.neurgrad for row in names["one"].itertuples()}  # type: ignore[attr-defined]
    assert {(prompt, target): value for prompt, target, value in names["rows"]} == mine  # type: ignore[attr-defined]
    by_polars = {(row["prompt_id"], row["target"]): row["neurgrad"][7] for row in names["frame"].to_dicts()}  # type: ignore[attr-defined]
    assert by_polars == mine
