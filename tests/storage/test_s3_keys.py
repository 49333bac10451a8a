"""Keys on a real S3 server: what is put under an odd prefix is listed, read and deleted there and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import s3fs

import neg_service
from infra.s3.server import BUCKET, Server, server_on
from neg_service.config import NeuronsConfig
from neg_service.inputs import parts_of_input, read_if_there
from neg_service.measures.choice import with_list_read
from neg_service.prompts.sources import load_prompts
from neg_service.report.sections.loading import load
from neg_service.storage.parts import encode_part, part_key
from neg_service.storage.retries import RetryingStore
from neg_service.storage.run import note, read_run_file, write_or_match
from neg_service.storage.s3 import S3Store
from neg_service.storage.status import status_of
from neg_service.storage.stores import open_store
from neg_service.storage.verify import verify
from tests.rare import one_of
from tests.s3 import acting_as
from tests.storage.conftest import TABLES, identity, tables_of

ODD = ["exp#1", "exp?1", "exp%23", "a%2Fb", "a  b", "a+b", "cafe\u0301", "a::b", "a[b]", " a", "..."]
# `make test-faults` has these too.
ODDER = [
    "exp;1", "exp%1", "a b", "a\tb", "a&b=c", "caf\u00e9", "a@b", "a:b", "a*b", "a{b}", "a'b\"", "a ", "~a", "a$b",
    "\U0001f600", "a<b>&amp;",
]  # fmt: skip
NAMES = [*ODD, *(pytest.param(own, marks=pytest.mark.faults) for own in ODDER)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = server_on(tmp_path_factory.mktemp("s3"))
    started.start()
    # One set of clients for all tests: making one takes a second.
    with acting_as(started.writer), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", started.endpoint_url)
        yield started
    started.stop()


@pytest.mark.parametrize("name", one_of(2, NAMES))
def test_a_run_is_found_again_under_the_key_that_was_typed(name: str, server: Server) -> None:
    raw = s3fs.S3FileSystem(endpoint_url=server.endpoint_url, use_listings_cache=False)
    uri = f"s3://{BUCKET}/runs/{name}/run{name}"
    store = open_store(uri, server.endpoint_url)
    store.check()
    begun = write_or_match(store, identity(), TABLES, {})
    for table, rows in tables_of(0).items():
        store.put(part_key(table, 0), encode_part(table, rows, begun.fingerprint, 0))
    note(store, {"engine": "x"})
    expected = sorted(["run.copy.json", "run.json", *(part_key(table, 0) for table in TABLES)])
    assert [entry.key for entry in store.list("")] == expected
    listed = raw.call_s3("list_objects_v2", Bucket=BUCKET, Prefix=f"runs/{name}/")["Contents"]
    assert sorted(one["Key"] for one in listed) == [f"runs/{name}/run{name}/{key}" for key in expected]
    run = neg_service.open_run(f"{uri}/", server.endpoint_url)
    assert (run.uri, run.name, run.about) == (uri, f"run{name}", {"engine": "x"})
    assert run.table("prompts").to_table().equals(tables_of(0)["prompts"])
    assert run.table("neurgrad").count_rows() == tables_of(0)["neurgrad"].num_rows
    assert status_of(run).done == {0}
    assert verify(store).not_done == [1, 2]
    assert [found.uri for found in load([uri, f"{uri}/"], server.endpoint_url).runs] == [uri]
    for key in expected:
        store.delete(key)
    assert store.list("") == []


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_read_under_the_key_that_was_typed(name: str, server: Server) -> None:
    raw = s3fs.S3FileSystem(endpoint_url=server.endpoint_url)
    row = b'{"prompt": "w1", "targets": [" w2"]}'
    place = {"Bucket": BUCKET, "Key": f"data/{name}/{name}.jsonl"}
    raw.call_s3("put_object", **place, Body=row)
    raw.call_s3("put_object", Bucket=BUCKET, Key=f"data/{name}/list/a.csv", Body=b"layer,neuron\n1,2\n")
    folder = f"s3://{BUCKET}/data/{name}"
    assert load_prompts(f"{folder}/{name}.jsonl")[0].text == "w1"
    assert read_if_there("dataset.source", f"{folder}/{name}.jsonl") is not None
    assert [content for _, content in parts_of_input("neurons.list", f"{folder}/{name}.jsonl")] == [row]
    assert with_list_read(NeuronsConfig(choose="list", list=f"{folder}/list/a.csv")).list.tolist() == [[1, 2]]


def test_an_object_is_replaced_only_where_it_is_the_one_that_was_read(server: Server) -> None:
    store = RetryingStore(S3Store(f"s3://{BUCKET}/replaced#1", server.endpoint_url), 5)
    assert not store.replace("t/a", b"one", b"two")
    assert store.get("t/a") is None
    store.put("t/a", b"one")
    assert not store.replace("t/a", b"other", b"two")
    assert store.replace("t/a", b"one", b"two")
    assert store.get("t/a") == b"two"


def test_notes_of_two_drivers_are_both_kept_whenever_the_other_speaks(server: Server) -> None:
    class Interrupted(S3Store):
        """Another driver says its word before the condition is put."""

        def get(self, key: str) -> bytes | None:
            found = super().get(key)
            if key == "run.json" and not spoken:
                spoken.append(key)
                note(S3Store(self.uri, self.endpoint_url), {"engine": "theirs", "cost": 1})
            return found

    spoken: list[str] = []
    store = Interrupted(f"s3://{BUCKET}/noted", server.endpoint_url)
    write_or_match(open_store(store.uri, server.endpoint_url), identity(), TABLES, {})
    note(store, {"calibration": 2, "engine": "ours"})
    assert read_run_file(store)["about"] == {"engine": "theirs", "cost": 1, "calibration": 2}
    assert store.get("run.json") == store.get("run.copy.json")
