"""Parts, run directories and the reader, on a local disk: whole or not there, and never damaged unnoticed."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import neg_service
from neg_service import schema
from neg_service.errors import ConfigurationError, DestinationError, NegServiceError, StorageError
from neg_service.storage import waiting
from neg_service.storage.objects import LocalStore
from neg_service.storage.parts import encode_part, footer_of, part_key, shard_of
from neg_service.storage.run import RUN_FILE, RunDirectory, fingerprint_of, write_or_match
from neg_service.storage.s3 import S3Store
from neg_service.storage.stores import open_store
from tests.refusals import refused

IDENTITY = {"model": {"identity": "sha256:1", "dtype": "float32"}, "plan": {"shard_size": 2, "shards": 3}}
TABLES = {"prompts": schema.PROMPTS, "activations": schema.activations(4)}


def activations(shard: int, rows: int = 3) -> pa.Table:
    values = np.arange(4 * rows, dtype=np.float32) * 1e-9 + shard
    return pa.Table.from_arrays(
        [
            pa.array([f"p{shard}"] * rows),
            pa.array(range(rows), pa.int16()),
            pa.nulls(rows, pa.int16()),
            pa.array(["paper"] * rows),
            pa.FixedSizeListArray.from_arrays(pa.array(values), 4),
        ],
        schema=schema.activations(4),
    )


def prompts(shard: int) -> pa.Table:
    row = {"prompt_id": f"p{shard}", "prompt": "x", "targets": ["a"], "target_tokens": [1], "answer": 0}
    return pa.Table.from_pylist([{**row, "probabilities": [0.5], "prediction": 0}], schema.PROMPTS)


def begin(tmp_path: Path) -> RunDirectory:
    return write_or_match(LocalStore(tmp_path / "run"), IDENTITY, TABLES, {"dataset": "x"})


def put(run: RunDirectory, shard: int, *tables: str) -> None:
    made = {"prompts": prompts(shard), "activations": activations(shard)}
    for name in tables or TABLES:
        run.store.put(part_key(name, shard), encode_part(name, made[name], run.fingerprint, shard))


def test_values_come_back_bit_for_bit(tmp_path: Path) -> None:
    run = begin(tmp_path)
    put(run, 0)
    put(run, 2)
    table = neg_service.open_run(str(tmp_path / "run")).table("activations").to_table()
    assert table.equals(pa.concat_tables([activations(0), activations(2)]))
    assert table["activation"].type == pa.list_(pa.float32(), 4)


def test_a_part_says_what_it_is(tmp_path: Path) -> None:
    run = begin(tmp_path)
    put(run, 7)
    footer = footer_of((tmp_path / "run" / "activations" / "shard-000007.parquet").read_bytes())
    assert len(footer.pop("sha256")) == 64
    assert footer == {"fingerprint": run.fingerprint, "table": "activations", "shard": 7, "rows": 3}
    assert shard_of(part_key("activations", 7)) == 7
    assert shard_of(part_key("activations", 12_345_678)) == 12_345_678
    assert shard_of("activations/other.parquet") is None


def test_a_shard_is_done_when_its_parts_of_all_tables_are_there(tmp_path: Path) -> None:
    run = begin(tmp_path)
    put(run, 0)
    put(run, 1, "prompts")
    assert run.done() == {0}
    opened = neg_service.open_run(str(tmp_path / "run"))
    assert opened.table("prompts").to_table()["prompt_id"].to_pylist() == ["p0"]
    assert opened.n_shards == 3


def test_a_run_that_has_nothing_yet_gives_empty_tables_with_their_columns(tmp_path: Path) -> None:
    begin(tmp_path)
    table = neg_service.open_run(str(tmp_path / "run")).table("activations").to_table()
    assert table.num_rows == 0
    assert table.schema.names == ["prompt_id", "layer", "expert", "basis", "activation"]


def test_a_put_that_dies_halfway_is_not_seen(tmp_path: Path) -> None:
    # A process that is killed between writing and renaming.
    code = """
import os, sys
from pathlib import Path
from neg_service.storage.objects import LocalStore
Path.replace = lambda self, target: os._exit(9)
LocalStore(Path(sys.argv[1])).put("t/shard-000000.parquet", b"half")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == 9
    store = LocalStore(tmp_path)
    assert store.list("t") == []
    assert list((tmp_path / "t").glob("*.parquet")) == []
    store.put("t/shard-000000.parquet", b"whole")
    assert [entry.key for entry in store.list("t")] == ["t/shard-000000.parquet"]
    assert store.get("t/shard-000000.parquet") == b"whole"


def test_a_put_that_fails_leaves_the_old_object_and_no_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    store.put("t/a", b"old")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with refused(DestinationError, "storage.uri", says="No space left on device"):
        store.put("t/a", b"new")
    assert store.get("t/a") == b"old"
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["a"]


def test_a_flipped_byte_is_noticed_by_the_reader(tmp_path: Path) -> None:
    run = begin(tmp_path)
    put(run, 0)
    part = tmp_path / "run" / "activations" / "shard-000000.parquet"
    content = bytearray(part.read_bytes())
    column = pq.ParquetFile(part).metadata.row_group(0).column(4)
    content[column.data_page_offset + column.total_compressed_size - 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(OSError, match=r"[Cc][Rr][Cc]"):
        neg_service.open_run(str(tmp_path / "run")).table("activations").to_table()


def test_the_same_identity_continues_and_another_is_refused_field_by_field(tmp_path: Path) -> None:
    run = begin(tmp_path)
    assert begin(tmp_path).fingerprint == run.fingerprint
    file = tmp_path / "run" / RUN_FILE
    edited = json.loads(file.read_text())
    edited["identity"]["model"]["dtype"] = "bfloat16"
    file.write_text(json.dumps(edited))
    with refused(DestinationError, setting=None, says=r'model\.dtype: "bfloat16" there, "float32" asked'):
        begin(tmp_path)


def test_a_place_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with refused(DestinationError, setting=None, says=r"holds thesis\.tex but no run\.json"):
        begin(tmp_path)
    (tmp_path / "run" / RUN_FILE).write_text("{")
    with refused(DestinationError, setting=None, says=r"run\.json is damaged"):
        begin(tmp_path)
    (tmp_path / "run" / RUN_FILE).write_text("[]")
    with refused(DestinationError, setting=None, says="is not a run's"):
        begin(tmp_path)


def test_failed_shards_are_kept_with_their_errors_and_taken_back(tmp_path: Path) -> None:
    run = begin(tmp_path)
    run.record_failure(4, "prompt 'x': NaN", 3)
    assert run.failed() == {4: {"shard": 4, "error": "prompt 'x': NaN", "attempts": 3}}
    put(run, 3)
    run.record_failure(3, "prompt 'y': NaN", 3)
    run.clear_resolved()
    assert list(run.failed()) == [4]


def test_the_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    assert fingerprint_of({"a": 1, "b": [1, 2]}) == fingerprint_of({"b": [1, 2], "a": 1})
    assert fingerprint_of({"a": 1, "b": [1, 2]}) != fingerprint_of({"a": 1, "b": [2, 1]})


def test_uris_open_the_store_they_name(tmp_path: Path) -> None:
    assert open_store(str(tmp_path)).uri == open_store(f"file://{tmp_path}").uri == str(tmp_path)
    assert isinstance(open_store("s3://bucket/prefix"), S3Store)
    with refused(
        DestinationError, "storage.uri", "file://results", says="names a host; an absolute path begins with file:///"
    ):
        open_store("file://results")
    with refused(DestinationError, "storage.uri", "ftp://somewhere", says="scheme 'ftp' is unknown"):
        open_store("ftp://somewhere")


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refused(DestinationError, "storage.uri", says="Not a directory"):
        LocalStore(tmp_path / "file" / "below").put("a", b"")
    with refused(NegServiceError, "storage.uri", "/proc/nowhere"):
        LocalStore(Path("/proc/nowhere")).put("a", b"")


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with refused(DestinationError, setting=None, says=r"there is no run\.json"):
        neg_service.open_run(str(tmp_path))
    begin(tmp_path)
    with refused(ConfigurationError, setting=None, says="has no table 'neurgrad'; it has prompts, activations"):
        neg_service.open_run(str(tmp_path / "run")).table("neurgrad")


def test_reading_needs_no_torch_no_ray_and_no_hydra(tmp_path: Path) -> None:
    run = begin(tmp_path)
    put(run, 0)
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "ray", "hydra", "omegaconf", "matplotlib", "tqdm", "pandas"}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import neg_service
print(neg_service.open_run(sys.argv[1]).table("activations").count_rows())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.stdout == "3\n", done.stderr


def test_a_server_that_does_not_answer_is_a_storage_error_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SECONDS_WITHOUT_RETRIES", 2.0)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    with socket.socket() as taken:
        # Bound and not listening: a port where nothing answers.
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with refused(StorageError, "storage.uri", says=r"s3://bucket/x \(storage\.endpoint_url=http") as caught:
            open_store("s3://bucket/x", endpoint).get("a")
    assert "hush" not in str(caught.value)
