"""Results on a real S3 server: a scan puts them there or is refused before it starts, and every reader loads them."""

from __future__ import annotations

import json
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray
import s3fs

import neg_service
from infra.s3.server import BUCKET, Keys, Server
from jobs.entry import composed
from jobs.scan import scan
from jobs.status import StatusConfig, status
from jobs.verify import VerifyConfig, verify
from neg_service import schema
from neg_service.cluster.prepare import prepare
from neg_service.config import ScanConfig
from neg_service.errors import DestinationError
from neg_service.storage.parts import encode_part, part_key
from neg_service.storage.run import write_or_match
from neg_service.storage.stores import open_store
from tests.e2e.commands import ROOT, environment, job, refused, scan_config
from tests.faults.proxy import Proxy
from tests.here import run_here, scan_here
from tests.s3 import acting_as, credentials


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"w1 w{i}", "targets": [" w3", " w4"], "answer": " w3", "id": f"p{i}"} for i in range(5)]
    path = tmp_path_factory.mktemp("data") / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def scanned(server: Server, tiny_directory: Path, words: Path) -> tuple[str, list[str], list[str]]:
    """The URI of a finished run, the settings of its scan, and what it logged as JSON objects."""
    arguments = [f"model.source={tiny_directory}", f"dataset.source={words}", f"storage.uri=s3://{BUCKET}/results"]
    arguments += [
        f"storage.endpoint_url={server.endpoint_url}",
        "cluster.replicas=1",
        "cluster.cpus_per_replica=1",
        "job.shard_size=2",
    ]
    as_json = ["job.log=json", "job.progress_seconds=0"]
    done = job("scan", *arguments, *as_json, env=environment(**credentials(server.writer)))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    lines = done.stderr.splitlines()
    (uri,) = re.findall(r"results +(s3://\S+)", json.loads(lines[-1])["message"])
    return uri, arguments, lines


@pytest.mark.faults
@pytest.mark.ray
def test_logs_are_json_on_request(scanned: tuple[str, list[str], list[str]]) -> None:
    said = [json.loads(line) for line in scanned[2]]
    assert {one["run"] for one in said} == {scanned[0].rpartition("/")[2]}
    (ready,) = [one for one in said if "is ready: pid" in one["message"]]
    assert ready["replica"] == 0
    assert any(re.match(r"\d+/\d+ prompts", one["message"]) for one in said)


@pytest.mark.ray
@pytest.mark.usefixtures("as_writer")
def test_a_scan_lands_in_s3_and_no_secret_is_anywhere(
    scanned: tuple[str, list[str], list[str]], server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    uri, arguments, printed = scanned
    began = time.time()
    assert f'open_run("{uri}", "{server.endpoint_url}")' in json.loads(printed[-1])["message"]
    run = neg_service.open_run(uri, server.endpoint_url)
    assert run.done() == {0, 1, 2}
    assert run.table("neurgrad").to_table().num_rows == 5 * 2 * 3
    assert scan(composed("scan", arguments, ScanConfig)) == 0
    again = capfd.readouterr()
    assert "this run was finished already" in again.out
    where = [f"run={uri}", f"storage.endpoint_url={server.endpoint_url}"]
    assert status(composed("status", where, StatusConfig)) == 0
    assert verify(composed("verify", where, VerifyConfig)) == 0
    asked = capfd.readouterr()
    assert asked.out.count(uri) >= 2
    everything = [*printed, *again, *asked]
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
    rows = {
        "prompt_id": [f"p{i // 10}" for i in range(300)],
        "layer": [*range(10)] * 30,
        "expert": [None] * 300,
        "basis": ["paper"] * 300,
    }
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
    # That of a catalogue: `test_catalogue.py`.
    for block in (own for own in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "register_run" not in own):
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


@pytest.mark.usefixtures("as_writer")
def test_a_run_in_s3_is_extended_there_and_on_a_disk(
    server: Server, tiny_directory: Path, words: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shared = [f"model.source={tiny_directory}", "job.shard_size=2", f"storage.endpoint_url={server.endpoint_url}"]
    place = f"storage.uri=s3://{BUCKET}/grown"
    base = scan_here(scan_config(*shared, place, f"dataset.source={words}"))
    before = [(entry.key, entry.modified) for entry in base.directory.store.list("")]
    (tmp_path / "more.jsonl").write_text(
        words.read_text() + "".join(f'{{"prompt": "w1 w9{i}", "targets": [" w3"], "id": "n{i}"}}\n' for i in range(3))
    )
    asked = [*shared, f"dataset.source={tmp_path}/more.jsonl", f"job.extend={base.uri}"]
    for here in (place, f"storage.uri={tmp_path}/results"):
        begun = run_here(prepare(scan_config(*asked, here)), shards=1)
        assert neg_service.open_run(begun.uri, server.endpoint_url).done() == {0, 1, 2, 3}
        run = scan_here(scan_config(*asked, here))
        assert run.table("prompts").to_table()["prompt_id"].to_pylist() == [f"p{i}" for i in range(5)] + [
            f"n{i}" for i in range(3)
        ]
        assert run.neuron(1, 7).num_rows == 5 * 2 + 3
        where = [f"run={run.uri}", f"storage.endpoint_url={server.endpoint_url}"]
        assert verify(composed("verify", where, VerifyConfig)) == 0
        assert status(composed("status", where, StatusConfig)) == 0
        said = capfd.readouterr().out
        assert said.count("clean: every part is there") == 2
        assert f"{base.uri}: 3 prompts beside its 5" in said
    assert [(entry.key, entry.modified) for entry in base.directory.store.list("")] == before
