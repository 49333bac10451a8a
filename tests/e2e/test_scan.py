"""The scan as a person runs it: commands, exit codes, tables, what is printed, and what is refused.

One scan runs as a command with Ray of its own, and most tests read what it left. Others are driven by this process, on
a cluster that they join, and what is no matter of processes runs in this one: refusals, plans, what is kept.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pytest
import ray
from ray.cluster_utils import Cluster

import neg_service
from jobs.entry import EXIT_INCOMPLETE, composed
from jobs.scan import scan
from neg_service.config import ScanConfig
from neg_service.errors import NegServiceError
from neg_service.report.console import accuracy, strongest
from tests.e2e.commands import in_order, job, refused, scan_config
from tests.fakes import save_tiny_model
from tests.here import scan_here

pytestmark = pytest.mark.ray
N_PROMPTS = 21


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "words.jsonl"
    rows = [
        {
            "prompt": " ".join(f"w{(i * 7 + j) % 90 + 1}" for j in range(i % 5 + 1)),
            "targets": [" w3", " w4", " w5"][: i % 2 + 2],
        }
        | {"answer": " w4", "id": f"row-{i}"}
        for i in range(N_PROMPTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def arguments(tiny_directory: Path, dataset: Path) -> list[str]:
    return [f"model.source={tiny_directory}", f"dataset.source={dataset}", "job.shard_size=4", "cluster.replicas=1"]


@pytest.fixture(scope="module")
def finished(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The output and the run directory of a quiet scan."""
    place = tmp_path_factory.mktemp("results")
    done = job("scan", *arguments, f"storage.uri={place}")
    assert done.returncode == 0, done.stderr
    (run,) = place.iterdir()
    return done.stdout + done.stderr, run


@pytest.fixture(scope="module")
def otherwise(arguments: list[str], joined: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the same scan in other shards and batches on two replicas."""
    place = tmp_path_factory.mktemp("otherwise")
    other = ["job.shard_size=5", "cluster.replicas=2", "cluster.cpus_per_replica=1", "cluster.batch_bytes=300000"]
    assert scanned(*arguments, f"storage.uri={place}", *other) == 0
    (run,) = place.iterdir()
    return run


def scanned(*arguments: str) -> int:
    """The exit code of a scan in this process."""
    return scan(composed("scan", list(arguments), ScanConfig))


def test_the_tables_hold_what_the_library_gives(
    finished: tuple[str, Path], tiny_directory: Path, dataset: Path
) -> None:
    run = neg_service.open_run(str(finished[1]))
    assert run.tables == ["prompts", "activations", "neurgrad"]
    assert run.config["measure"]["basis"] == "paper"
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    prompts = run.table("prompts").to_table().to_pylist()
    assert [row["prompt_id"] for row in prompts] == [row["id"] for row in rows]
    model = neg_service.load_model(str(tiny_directory))
    expected = neg_service.neurgrad(model, [row["prompt"] for row in rows], [row["targets"] for row in rows])
    values = run.table("neurgrad").to_table().to_pandas()
    active = run.table("activations").to_table().to_pandas()
    assert len(values) == sum(len(row["targets"]) for row in rows) * 3
    assert len(active) == N_PROMPTS * 3
    for i, row in enumerate(rows):
        for k in range(len(row["targets"])):
            mine = values[(values.prompt_id == row["id"]) & (values.target_index == k)]
            np.testing.assert_allclose(mine.probability, expected.probability[i, k], rtol=1e-5)
        np.testing.assert_allclose(
            prompts[i]["probabilities"], expected.probability[i, : len(row["targets"])], rtol=1e-5
        )
        assert prompts[i]["answer"] == 1
        assert prompts[i]["prediction"] == int(np.nanargmax(expected.probability[i]))
        own = values[values.prompt_id == row["id"]].sort_values(["target_index", "layer"])
        found = np.stack(own.neurgrad.to_list()).reshape(len(row["targets"]), 3, 40)
        np.testing.assert_allclose(found, expected.neurgrad[i, : len(row["targets"])], rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(
            np.stack(active[active.prompt_id == row["id"]].activation), expected.activation[i], rtol=1e-4, atol=1e-6
        )
        assert own.is_answer.tolist() == [target == " w4" for target in row["targets"] for _ in range(3)]


def test_what_is_printed_helps_a_person(finished: tuple[str, Path]) -> None:
    output, run = finished
    assert re.search(r"21/21 prompts \(100 %\), [\d.e+]+ prompts/s, 0:00 left", output)
    assert re.search(r"prompts +21 \(52 targets\)", output)
    assert re.search(r"accuracy +[\d.]+ % \(\d+ of 21\)", output)
    assert re.search(r"replica 0 is ready: pid \d+ on ", output)
    assert f'neg_service.open_run("{run}")' in output
    # The snippet runs as printed.
    snippet = output.split("load it:")[1]
    names: dict[str, object] = {}
    exec(snippet[: snippet.index(") ", snippet.index("head"))] + ")" if ") " in snippet else snippet, names)
    assert names["table"].num_rows == 52 * 3  # type: ignore[attr-defined]


@pytest.mark.faults
@pytest.mark.usefixtures("joined")
def test_rows_that_a_finished_run_has_not_are_added_to_it(
    finished: tuple[str, Path], arguments: list[str], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished[1].rglob("*") if path.is_file()}
    more = tmp_path / "more.jsonl"
    new = [{"prompt": f"w9 w{i}", "targets": [" w3", " w4"], "answer": " w4", "id": f"new-{i}"} for i in range(5)]
    more.write_text(dataset.read_text() + "".join(json.dumps(row) + "\n" for row in new))
    asked = [*arguments, f"dataset.source={more}", f"storage.uri={tmp_path}/results", f"job.extend={finished[1]}"]
    assert scanned(*asked) == 0
    said = capsys.readouterr()
    assert "5/5 prompts" in said.err
    assert re.search(
        r"prompts +5 \(10 targets\)\n +extends +21 prompts in 6 shards of \S+\n +shards +2 of 2 done", said.out
    )
    (place,) = (tmp_path / "results").iterdir()
    assert len(list(place.glob("neurgrad/*.parquet"))) == 2
    run = neg_service.open_run(place)
    assert run.table("prompts").to_table()["prompt_id"].to_pylist() == [
        *(f"row-{i}" for i in range(N_PROMPTS)),
        *(f"new-{i}" for i in range(5)),
    ]
    assert scanned(*asked) == 0
    assert "this run was finished already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished[1].rglob("*") if path.is_file()} == before


def test_the_same_command_on_a_finished_run_does_nothing(
    finished: tuple[str, Path], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished[1].rglob("*") if path.is_file()}
    # But for what a writer left that was killed in the middle of a put, two hours ago.
    left = finished[1] / "neurgrad" / ".unfinished.shard-000000.parquet.0123"
    left.write_bytes(b"half")
    os.utime(left, (time.time() - 7200,) * 2)
    assert scanned(*arguments, f"storage.uri={finished[1].parent}") == 0
    assert "this run was finished already; nothing was done" in capsys.readouterr().out
    assert not ray.is_initialized()
    assert {path: path.stat().st_mtime_ns for path in finished[1].rglob("*") if path.is_file()} == before


def test_every_reader_loads_the_parts(finished: tuple[str, Path]) -> None:
    run = neg_service.open_run(str(finished[1]))
    glob = f"{finished[1]}/neurgrad/*.parquet"
    expected = run.table("neurgrad").to_table()
    total = float(np.abs(expected["neurgrad"].combine_chunks().flatten().to_numpy()).sum())
    frame = pd.read_parquet(finished[1] / "neurgrad")
    assert float(np.abs(np.stack(frame.neurgrad.to_list())).sum()) == pytest.approx(total, rel=1e-5)
    lazy = pl.scan_parquet(glob).select(pl.col("neurgrad").arr.to_list().explode().abs().sum()).collect()
    assert lazy.item() == pytest.approx(total, rel=1e-4)
    (row,) = duckdb.sql(f"select count(*), sum(list_sum([abs(x) for x in neurgrad])) from '{glob}'").fetchall()
    assert row[0] == expected.num_rows
    assert row[1] == pytest.approx(total, rel=1e-4)


def test_the_strongest_neurons_and_the_accuracy_are_right(finished: tuple[str, Path]) -> None:
    run = neg_service.open_run(str(finished[1]))
    top = strongest(run, "row-7", " w4", 5)
    table = run.table("neurgrad").to_table().to_pandas()
    rows = table[(table.prompt_id == "row-7") & (table.target == " w4")].sort_values("layer")
    flat = np.stack(rows.neurgrad.to_list()).ravel()
    assert [abs(neuron.values["neurgrad"]) for neuron in top] == sorted(np.abs(flat), reverse=True)[:5]
    assert all(flat[neuron.layer * 40 + neuron.index] == np.float32(neuron.values["neurgrad"]) for neuron in top)
    prompts = run.table("prompts").to_table().to_pylist()
    assert accuracy(run).right == sum(row["answer"] == row["prediction"] for row in prompts)


@pytest.mark.parametrize("keep", ["answer", "top_k"])
def test_less_can_be_kept(keep: str, arguments: list[str], finished: tuple[str, Path], tmp_path: Path) -> None:
    run = scan_here(scan_config(*arguments, f"storage.uri={tmp_path}", f"measure.keep={keep}", "measure.top_k=7"))
    full = neg_service.open_run(str(finished[1])).table("neurgrad").to_table().to_pandas()
    if keep == "answer":
        kept = run.table("neurgrad").to_table().to_pandas()
        assert kept.is_answer.all()
        assert len(kept) == N_PROMPTS * 3
        both = kept.merge(full, on=["prompt_id", "target_index", "layer"], suffixes=("", "_full"))
        assert len(both) == len(kept)
        np.testing.assert_allclose(np.stack(both.neurgrad), np.stack(both.neurgrad_full), rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(both.probability, both.probability_full, rtol=1e-5)
        return
    active = neg_service.open_run(str(finished[1])).table("activations").to_table().to_pandas()
    assert run.tables == ["prompts", "top_neurons"]
    kept = run.table("top_neurons").to_table().to_pandas()
    assert len(kept) == 52 * 7
    for (prompt, target), rows in kept.groupby(["prompt_id", "target_index"]):
        rows = rows.sort_values("rank")
        own = full[(full.prompt_id == prompt) & (full.target_index == target)].sort_values("layer")
        flat = np.stack(own.neurgrad.to_list()).ravel()
        layers = active[active.prompt_id == prompt].sort_values("layer")
        at = np.stack(layers.activation.to_list()).ravel()[rows.layer * 40 + rows.neuron]
        np.testing.assert_allclose(rows.activation, at, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(rows.probability, own.probability.iloc[0], rtol=1e-5)
        assert rows["rank"].tolist() == list(range(7))
        np.testing.assert_allclose(np.abs(rows.neurgrad), np.sort(np.abs(flat))[::-1][:7], rtol=1e-4)
        np.testing.assert_allclose(flat[rows.layer * 40 + rows.neuron], rows.neurgrad, rtol=1e-3)


@pytest.mark.faults
def test_the_shard_size_and_the_number_of_replicas_change_nothing(finished: tuple[str, Path], otherwise: Path) -> None:
    one, other = (
        in_order(neg_service.open_run(str(path)).table("neurgrad").to_table()) for path in (finished[1], otherwise)
    )
    assert one.drop_columns(["neurgrad", "probability"]).equals(other.drop_columns(["neurgrad", "probability"]))
    a, b = (np.stack(table["neurgrad"].to_pandas().to_list()) for table in (one, other))
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-9)


def test_on_a_cluster_that_is_there_a_poisoned_prompt_quarantines_its_shard_and_the_rest_is_done(
    joined: Cluster,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    # The embedding of w64 is infinite; row-9 begins with it.
    model = save_tiny_model(tmp_path / "model", lambda m: m.model.embed_tokens.weight.data[64].fill_(float("inf")))
    place = tmp_path / "results"
    caplog.set_level(logging.INFO, "neg_service")
    arguments = [f"model.source={model}", f"dataset.source={dataset}", "job.shard_size=4", f"storage.uri={place}"]
    assert scanned(*arguments, "cluster.replicas=1") == EXIT_INCOMPLETE
    assert "shard 2: prompt 'row-9' (5 tokens) in float32: NaN or infinity" in capsys.readouterr().out
    run = neg_service.open_run(str(next(place.iterdir())))
    assert run.done() == {0, 1, 3, 4, 5}
    assert "row-9" in run.directory.failed()[2]["error"]
    stored = run.table("neurgrad").to_table()["neurgrad"].combine_chunks().flatten().to_numpy()
    assert np.isfinite(stored).all()
    # Its replica was one of the cluster that $RAY_ADDRESS names.
    (pid,) = re.findall(r"replica 0 is ready: pid (\d+)", caplog.text)
    assert list(Path(joined.head_node.get_logs_dir_path()).glob(f"worker-*-{pid}.err"))


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scanned(*arguments, f"storage.uri={tmp_path}", "job.dry_run=true") == 0
    shown = capsys.readouterr().out
    for what in ("21 with 52 targets", "6 of up to 4 prompts", "120 in 3 layers", "of memory", "before compression"):
        assert what in shown
    assert list(tmp_path.iterdir()) == []
    assert not ray.is_initialized()


def test_a_mistake_is_one_line_and_writes_nothing(tiny_directory: Path, tmp_path: Path) -> None:
    data, place = _tiny_data(tmp_path, []), tmp_path / "results"
    done = job("scan", f"model.source={tiny_directory}", *data, f"storage.uri={place}", "modle.source=x")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: modle.source is no setting")
    assert not place.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["measure=nothing"],
            "Available options in 'measure': activation; aggregate_importance; control; gradient;",
        ),
        (["dataset=file"], "dataset.source: has no value; give one"),
        (["storage.uri=ftp://host/x"], "scheme 'ftp' is unknown"),
        (["cluster.cpus_per_replica=999"], "cluster.cpus_per_replica=999: the largest node has"),
        (["storage.uri=/proc/nowhere"], "storage.uri=/proc/nowhere"),
    ],
)
@pytest.mark.usefixtures("joined")
def test_what_a_scan_cannot_do_is_one_line_and_writes_nothing(
    arguments: list[str], message: str, tiny_directory: Path, tmp_path: Path
) -> None:
    data = _tiny_data(tmp_path, arguments)
    place = f"storage.uri={tmp_path / 'results'}"
    with pytest.raises(NegServiceError) as error:
        scanned(f"model.source={tiny_directory}", *data, place, *arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dataset.source=nothing"], "dataset.source=nothing: neither a built-in data set"),
        (["measure.basis=bias"], "measure.basis=bias: must be one of paper, hidden, gate"),
        (["cluster.stall_seconds=0"], "cluster.stall_seconds=0: must be auto or a number, at least 1"),
        (["storage.retry_timeout_seconds=-1"], "storage.retry_timeout_seconds=-1.0: must be 0 or more"),
        (["cluster.unreachable_seconds=-1"], "cluster.unreachable_seconds=-1.0: must be 0 or more"),
        (["job.resume=nowhere"], "nowhere: there is no run.json"),
    ],
)
def test_what_cannot_be_done_is_refused_when_it_is_planned(
    arguments: list[str], message: str, tiny_directory: Path, tmp_path: Path
) -> None:
    place = [f"storage.uri={tmp_path}"]
    refused(message, f"model.source={tiny_directory}", *_tiny_data(tmp_path, arguments), *place, *arguments)


def _tiny_data(tmp_path: Path, arguments: list[str]) -> list[str]:
    if any("dataset" in argument for argument in arguments):
        return []
    (tmp_path / "one.jsonl").write_text('{"prompt": "w1", "targets": [" w2"]}\n')
    return [f"dataset.source={tmp_path}/one.jsonl"]
