"""The reader: columns and filters in a Dataset, one neuron over all prompts, several runs side by side."""

from __future__ import annotations

import shutil
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import neg_service
from neg_service import schema
from neg_service.errors import ConfigurationError, DestinationError
from neg_service.schema import SCHEMA_VERSION, Table
from neg_service.storage.objects import LocalStore
from neg_service.storage.parts import encode_part, part_key
from neg_service.storage.reader import Run
from neg_service.storage.run import write_or_match
from tests.older import made_older
from tests.refusals import refused
from tests.storage.conftest import NEURONS, begin, identity, put


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two of three shards: as while it runs."""
    put(begin(tmp_path / "one"), 0, 2)
    return neg_service.open_run(str(tmp_path / "one"))


def test_columns_and_a_filter_on_others_stay_with_the_dataset(run: Run) -> None:
    dataset = run.table("neurgrad", columns=["prompt_id", "neurgrad"], filter=pc.field("layer") == 1)
    assert dataset.schema.names == ["prompt_id", "neurgrad"]
    table = dataset.to_table()
    assert table.schema.names == ["prompt_id", "neurgrad"]
    assert table["prompt_id"].to_pylist() == [p for p in ("p0", "p1", "p4", "p5") for _ in range(2)]
    # p4, target 1, layer 1: -2 * (4 + 0.1 + 0.01 n).
    np.testing.assert_allclose(table["neurgrad"][5].as_py(), [-8.2, -8.22, -8.24, -8.26], rtol=1e-6)
    assert dataset.count_rows() == 8
    assert dataset.filter(pc.field("prompt_id") == "p4").to_table().num_rows == 2
    assert dataset.head(3).schema.names == ["prompt_id", "neurgrad"]


def test_duckdb_and_polars_take_it_as_it_is(run: Run) -> None:
    dataset = run.table("neurgrad", columns=["prompt_id", "target", "neurgrad"], filter=pc.field("layer") == 0)
    (row,) = duckdb.sql("select neurgrad[3] from dataset where prompt_id = 'p5' and target = 'b'").fetchall()
    assert row[0] == np.float32(-10.04)
    frame = pl.scan_pyarrow_dataset(dataset).filter(pl.col("target") == "a").select("prompt_id").collect()
    assert frame["prompt_id"].to_list() == ["p0", "p1", "p4", "p5"]


def test_a_layer_is_a_row_group_of_its_own(run: Run) -> None:
    file = pq.ParquetFile(Path(run.uri) / part_key("neurgrad", 0))
    assert file.num_row_groups == 2
    for group in range(2):
        assert set(file.read_row_group(group)["layer"].to_pylist()) == {group}
    # And within it the prompts in their order.
    assert file.read_row_group(1)["prompt_id"].to_pylist() == ["p0", "p0", "p1", "p1"]


def test_one_neuron_over_all_prompts_that_are_done(run: Run) -> None:
    table = run.neuron(1, 3)
    assert table["prompt_id"].to_pylist() == [p for p in ("p0", "p1", "p4", "p5") for _ in range(2)]
    assert table["target_index"].to_pylist() == [0, 1] * 4
    assert set(table["layer"].to_pylist()) == {1}
    active = [np.float32(int(p[1:]) + 0.13) for p in table["prompt_id"].to_pylist()]
    np.testing.assert_allclose(table["activation"], active, rtol=1e-6)
    expected = [-(k + 1) * a for k, a in zip(table["target_index"].to_pylist(), active, strict=True)]
    np.testing.assert_allclose(table["neurgrad"], expected, rtol=1e-6)


def test_a_neuron_of_a_sweep_is_its_rows(tmp_path: Path) -> None:
    names = [field.name for field in schema.sweep() if field.type == pa.float32()]
    rows = [
        {"prompt_id": "p", "target_index": 0, "target": "a", "layer": layer, "neuron": neuron, "is_resolved": True}
        | {"basis": "paper", "shift": "magnitude", "dtype": "float32", "n_shifts": 2}
        | dict.fromkeys(names, layer + neuron / 10)
        for layer in range(2)
        for neuron in range(3)
    ]
    store = LocalStore(tmp_path)
    run = write_or_match(store, {"plan": {"shards": 1}}, {"sweep": schema.sweep()}, {})
    data = encode_part("sweep", pa.Table.from_pylist(rows, schema.sweep()), run.fingerprint, 0)
    store.put(part_key("sweep", 0), data)
    table = neg_service.open_run(str(tmp_path)).neuron(1, 2)
    assert table["neg"].to_pylist() == [np.float32(1.2)]


def test_a_neuron_of_integrated_gradients_is_one_value_a_target(tmp_path: Path) -> None:
    kept = schema.integrated_gradients(3)
    rows = [
        {"prompt_id": "p", "target_index": k, "target": target, "layer": layer, "basis": "paper", "probability": 0.5}
        | {"integrated_gradients": [k + layer / 10 + n / 100 for n in range(3)]}
        for k, target in enumerate("ab")
        for layer in range(2)
    ]
    store = LocalStore(tmp_path)
    run = write_or_match(store, {"plan": {"shards": 1}}, {"integrated_gradients": kept}, {})
    data = encode_part("integrated_gradients", pa.Table.from_pylist(rows, kept), run.fingerprint, 0)
    store.put(part_key("integrated_gradients", 0), data)
    table = neg_service.open_run(str(tmp_path)).neuron(1, 2)
    assert table["target"].to_pylist() == ["a", "b"]
    assert table["integrated_gradients"].to_pylist() == [np.float32(0.12), np.float32(1.12)]


@pytest.mark.parametrize(
    ("layer", "neuron", "what"), [(2, 0, "layer 2"), (0, NEURONS, "neuron 4"), (-1, 0, "layer -1")]
)
def test_a_neuron_that_the_model_has_not_is_refused(layer: int, neuron: int, what: str, run: Run) -> None:
    with refused(ConfigurationError, says=f"has no {what}; "):
        run.neuron(layer, neuron)


def test_what_is_shown_can_be_sorted_and_joined(run: Run) -> None:
    dataset = run.table("activations", columns=["prompt_id", "activation"], filter=pc.field("layer") == 0)
    assert dataset.sort_by([("prompt_id", "descending")]).to_table()["prompt_id"].to_pylist() == [
        "p5",
        "p4",
        "p1",
        "p0",
    ]
    prompts = run.table("prompts", columns=["prompt_id", "prediction"])
    assert prompts.join(prompts, "prompt_id", right_suffix="_b").to_table().num_rows == 4


def test_a_column_that_is_not_there_is_refused(run: Run) -> None:
    with refused(ConfigurationError, "filter", "(nothing == 1)", says="No match for FieldRef"):
        run.table("activations", filter=pc.field("nothing") == 1)
    with refused(ConfigurationError, setting=None, says="there is no column 'neg'; there are prompt_id, layer"):
        run.table("activations", columns=["neg"])


def test_runs_lie_side_by_side_and_tell_whose_a_row_is(run: Run, tmp_path: Path) -> None:
    put(begin(tmp_path / "other", "bfloat16"), 1)
    runs = neg_service.open_runs([run.uri, str(tmp_path / "other")])
    assert runs.tables == run.tables
    table = runs.table("prompts", columns=["run", "prompt_id"]).to_table()
    assert table.to_pydict() == {
        "run": ["one"] * 4 + ["other"] * 2,
        "prompt_id": ["p0", "p1", "p4", "p5", "p2", "p3"],
    }
    other = runs.table("neurgrad", filter=(pc.field("run") == "other") & (pc.field("layer") == 0))
    assert set(other.to_table()["prompt_id"].to_pylist()) == {"p2", "p3"}
    # The other run's parts are not even opened.
    (tmp_path / "one" / part_key("neurgrad", 0)).write_bytes(b"damaged")
    assert set(other.to_table()["prompt_id"].to_pylist()) == {"p2", "p3"}
    put(run.directory, 0)
    both = runs.neuron(0, 0)
    assert both["run"].to_pylist() == ["one"] * 8 + ["other"] * 4


def test_runs_that_do_not_fit_side_by_side_are_refused(run: Run, tmp_path: Path) -> None:
    larger = {"prompts": schema.PROMPTS, "activations": schema.activations(9), "neurgrad": schema.neurgrad(9)}
    write_or_match(LocalStore(tmp_path / "larger"), {**identity(), "model": "9"}, larger, {})
    runs = neg_service.open_runs([run.uri, str(tmp_path / "larger")])
    assert runs.table("prompts").count_rows() == 4
    with refused(
        ConfigurationError, setting=None, says=r"column neurgrad is fixed_size_list.*\[4\] in one and .*\[9\]"
    ):
        runs.table("neurgrad")
    with refused(ConfigurationError, "runs", "['one', 'one']", says="give at least one run, and each once"):
        neg_service.open_runs([run.uri, run.uri])
    with refused(ConfigurationError, "runs", "[]", says="give at least one run"):
        neg_service.open_runs([])
    for open_any in (neg_service.open_run, neg_service.open_runs):
        for nothing in (None, 5):
            with refused(DestinationError, "run", nothing, allowed="a path or a URI, as text"):
                open_any(nothing)  # type: ignore[arg-type]


def with_experts(place: Path, **about: object) -> Run:
    """A run of a table with a neuron of no expert, and its namesakes in two experts."""
    kept = schema.activations([3, 2])
    rows = [
        {"prompt_id": p, "layer": layer, "expert": expert, "basis": "paper", "activation": values}
        for p in "ab"
        for layer, expert, values in ((0, None, [0.0, 0.1, 0.2]), (1, 0, [1.0, 1.1]), (1, 5, [5.0, 5.1]))
    ]
    store = LocalStore(place)
    run = write_or_match(store, {"plan": {"shards": 1}}, {"activations": kept}, about)
    data = encode_part("activations", pa.Table.from_pylist(rows, kept), run.fingerprint, 0)
    store.put(part_key("activations", 0), data)
    return neg_service.open_run(str(place))


def test_a_neuron_of_an_expert_and_lists_of_layers_that_differ_in_size(tmp_path: Path) -> None:
    run = with_experts(tmp_path / "mixture")
    assert run.schemas["activations"].field("activation").type == pa.list_(pa.float32())
    assert run.neuron(1, 1, expert=5)["activation"].to_pylist() == [np.float32(5.1)] * 2
    assert run.neuron(1, 1, 0)["activation"].to_pylist() == [np.float32(1.1)] * 2
    assert run.neuron(0, 2)["activation"].to_pylist() == [np.float32(0.2)] * 2
    assert run.neuron(1, 1).num_rows == 0
    assert run.neuron(1, 1, 7).num_rows == 0
    both = neg_service.open_runs([run.uri])
    assert both.neuron(1, 0, 5)["activation"].to_pylist() == [5.0, 5.0]


def test_rows_of_single_neurons_of_an_expert(tmp_path: Path) -> None:
    key = {"prompt_id": "p", "target_index": 0, "target": "a", "basis": "paper", "probability": 0.5, "activation": 1.0}
    rows = [
        {**key, "rank": rank, "layer": 2, "expert": expert, "neuron": 4, "neurgrad": rank / 10}
        for rank, expert in enumerate((None, 1, 3))
    ]
    store = LocalStore(tmp_path)
    run = write_or_match(store, {"plan": {"shards": 1}}, {"top_neurons": schema.TOP_NEURONS}, {})
    table = Table(schema.TOP_NEURONS, "NeurGrad", values="neurgrad").described()
    data = encode_part("top_neurons", pa.Table.from_pylist(rows, table), run.fingerprint, 0)
    store.put(part_key("top_neurons", 0), data)
    opened = neg_service.open_run(str(tmp_path))
    for expert, rank in ((None, 0), (1, 1), (3, 2)):
        assert opened.neuron(2, 4, expert)["rank"].to_pylist() == [rank]


def test_an_expert_of_a_model_without_experts_is_refused(run: Run, tmp_path: Path) -> None:
    dense = with_experts(tmp_path / "dense", model={"neurons_a_layer": 3, "experts_a_layer": 0})
    with pytest.raises(ConfigurationError, match=r"has no neuron \(1, 2, 5\); layer 1 has no experts"):
        dense.neuron(1, 2, expert=5)
    # As it was written before there were experts.
    older = tmp_path / "older"
    made_older(Path(shutil.copytree(run.uri, older)))
    assert "expert" not in neg_service.open_run(older).table("neurgrad").schema.names
    with pytest.raises(ConfigurationError, match=r"has no neuron \(1, 2, 0\); layer 1 has no experts"):
        neg_service.open_run(older).neuron(1, 2, expert=0)


def test_a_run_of_a_later_version_is_refused(run: Run, tmp_path: Path) -> None:
    later = dict(identity(), schema_version=SCHEMA_VERSION + 1)
    store = LocalStore(tmp_path / "later")
    write_or_match(store, later, {"prompts": schema.PROMPTS}, {})
    with pytest.raises(DestinationError, match=rf"schema {SCHEMA_VERSION + 1}; this one reads up to {SCHEMA_VERSION}"):
        neg_service.open_run(tmp_path / "later")


def test_a_run_of_before_is_read_alone_and_beside_another(run: Run, tmp_path: Path) -> None:
    older = tmp_path / "older"
    made_older(Path(shutil.copytree(run.uri, older)))
    opened = neg_service.open_run(older)
    assert opened.neuron(1, 3).equals(run.neuron(1, 3).drop_columns(["expert"]))
    for uris in ([run.uri, older], [older, run.uri]):
        table = neg_service.open_runs(uris).table("activations").to_table()
        assert table["expert"].null_count == table.num_rows == 16
        assert set(table["run"].to_pylist()) == {"one", "older"}
        assert neg_service.open_runs(uris).neuron(0, 1).num_rows == 16
