"""Sweeps and joint interventions as a person runs them, on a cluster or here, and the demo that shows them."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import neg_service
from jobs.demo import demo
from jobs.entry import composed
from jobs.scan import scan
from neg_service.cluster import scan as cluster_scan
from neg_service.cluster.prepare import Prepared
from neg_service.cluster.scan import Summary
from neg_service.config import ScanConfig
from neg_service.measures.builtin.aggregate_importance import total
from tests.e2e.commands import in_order, refused, scan_config
from tests.here import run_here, scan_here

pytestmark = pytest.mark.ray
KEYS = ["prompt_id", "target_index", "layer", "neuron"]
SWEPT = ["measure=sweep", "neurons=sample", "neurons.count=6", "measure.keep_curves=true"]


@pytest.fixture(scope="module")
def arguments(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("data") / "words.jsonl"
    rows = [
        {"prompt": " ".join(f"w{(i * 7 + j) % 90 + 1}" for j in range(i + 1)), "targets": [" w3", " w4"], "id": str(i)}
        for i in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"model.source={tiny_directory}", f"dataset.source={path}"]


def table_of(place: Path, name: str) -> pa.Table:
    """The table of the only run in `place` that has it."""
    runs = [neg_service.open_run(str(file.parent)) for file in place.glob("*/run.json")]
    (run,) = [run for run in runs if name in run.tables]
    assert run.done() == set(range(run.n_shards))
    return in_order(run.table(name).to_table())


def scanned(*arguments: str) -> int:
    """The exit code of a scan in this process."""
    return scan(composed("scan", list(arguments), ScanConfig))


def test_shards_change_nothing_and_the_noise_is_in_run_json(arguments: list[str], tmp_path: Path) -> None:
    tables = []
    for size in (5, 1):
        run = scan_here(scan_config(*arguments, *SWEPT, f"storage.uri={tmp_path}/{size}", f"job.shard_size={size}"))
        assert run.n_shards == 5 // size
        assert run.about["engine"] == "differences"
        noise = run.about["calibration"]["noise"]
        assert noise["reference"] == "float64"
        assert 0 < noise["sigma"] < 1e-5
        tables.append(table_of(tmp_path / str(size), "sweep"))
    require_the_same(*tables)
    np.testing.assert_allclose(tables[0]["resolution"], tables[1]["resolution"], rtol=1e-3)
    # A value at its very limit may fall on either side; here there is none.
    for column in ("is_resolved", "signs_agree"):
        assert tables[0][column] == tables[1][column]


@pytest.mark.faults
@pytest.mark.usefixtures("joined")
def test_replicas_change_nothing_and_all_go_by_one_calibration(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "neg_service")
    # All shifts, so that there is work for two.
    arguments = [*arguments, *SWEPT, "measure.grid=full"]
    here = scan_here(scan_config(*arguments, f"storage.uri={tmp_path / 'here'}"))
    # On replicas the noise is not the same from one to the other.
    many = ["measure.name=tests.moody_sweep", "job.shard_size=1", "cluster.replicas=2", "cluster.cpus_per_replica=1"]
    assert scanned(*arguments, *many, f"storage.uri={tmp_path / 'many'}") == 0
    assert re.search(r"neurons +18 for each target: 180 values", capsys.readouterr().out)
    assert "5 of 5 shards to do" in caplog.text
    assert "on up to 2 replicas" in caplog.text
    assert "replica 1 is ready" in caplog.text
    table, expected = (table_of(tmp_path / name, "sweep") for name in ("many", "here"))
    require_the_same(table, expected)
    (run,) = (tmp_path / "many").iterdir()
    about = json.loads((run / "run.json").read_text())["about"]
    assert about["engine"] == "differences"
    noise, own = about["calibration"]["noise"], here.about["calibration"]["noise"]
    assert noise["reference"] == "float64"
    assert noise["sigma"] > own["sigma"]
    # The resolution is the noise times what a row's logits moved by: what all of them go by is what run.json says.
    resolution = np.asarray(expected["resolution"]) * noise["sigma"] / own["sigma"]
    np.testing.assert_allclose(table["resolution"], resolution, rtol=1e-3)


def require_the_same(one: pa.Table, other: pa.Table) -> None:
    """All but what the noise decides."""
    assert one.select(KEYS) == other.select(KEYS)
    for column in ("neg", "r", "r2", "max_abs_delta_p", "neurgrad", "activation"):
        np.testing.assert_allclose(one[column], other[column], rtol=1e-3, atol=1e-8, err_msg=column)
    assert one["delta_p"].type.list_size == 40


@pytest.mark.usefixtures("joined")
def test_the_strongest_over_the_data_set_are_ranked_first(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_ray = cluster_scan.run

    def run(prepared: Prepared) -> Summary:
        """The ranking, which is a scan as any other, in this process."""
        is_ranking = prepared.identity["measure"]["name"] == "aggregate_importance"
        return run_here(prepared) if is_ranking else by_ray(prepared)

    monkeypatch.setattr(cluster_scan, "run", run)
    caplog.set_level(logging.INFO, "neg_service")
    top = ["measure=sweep", "neurons=top", "neurons.count=4", "neurons.over=dataset", "measure.grid=coarse"]
    asked = [*arguments, *top, f"storage.uri={tmp_path}", "cluster.replicas=1", "cluster.cpus_per_replica=1"]
    assert scanned(*asked) == 0
    assert "ranking neurons over the data set first" in caplog.text
    importance = total([table_of(tmp_path, "aggregate_importance")])
    best = np.argsort(-np.stack(list(importance.values())), axis=None)[:4]
    swept = table_of(tmp_path, "sweep")
    found = set(zip(swept["layer"].to_pylist(), swept["neuron"].to_pylist(), strict=True))
    assert found == {divmod(int(i), 40) for i in best}
    assert swept.num_rows == 4 * 5 * 2
    capsys.readouterr()
    assert scanned(*asked) == 0
    assert "this run was finished already" in capsys.readouterr().out


def test_joint_interventions_from_a_file(arguments: list[str], tmp_path: Path, tiny_directory: Path) -> None:
    edits = [{"name": "off", "neurons": [[0, 3], [2, 5]], "scale": 0}, {"neurons": [[1, 1]], "enhance": 0.5}]
    (tmp_path / "edits.json").write_text(json.dumps(edits))
    place = tmp_path / "results"
    asked = ["measure=intervene", f"measure.edits={tmp_path}/edits.json", f"storage.uri={place}"]
    scan_here(scan_config(*arguments, *asked))
    rows = table_of(place, "intervene").to_pylist()
    assert len(rows) == 5 * 2 * 2
    model = neg_service.load_model(str(tiny_directory))
    prompts = table_of(place, "prompts").to_pylist()
    found = neg_service.intervene(model, [p["prompt"] for p in prompts], [p["targets"] for p in prompts], edits)
    assert {row["edit"] for row in rows} == set(found.edits) == {"off", "edit-1"}
    for row in rows:
        expected = found.delta_p[int(row["prompt_id"]), found.edits.index(row["edit"]), row["target_index"]]
        assert row["delta_p"] == pytest.approx(expected, rel=1e-3, abs=1e-8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["measure.batch_bytes=1000"], "measure.batch_bytes=1000: must be at least 6552; holds 0 rows of 3276 bytes"),
        (["cluster.batch_bytes=1000"], "cluster.batch_bytes=1000: must be at least 6552; holds 0 rows of 3276 bytes"),
        (["neurons=top", "neurons.count=121"], "neurons.count=121: the choice must be from 1 to 120"),
        (["neurons=list", "neurons.list=[[0,1],[7,1]]"], "(7, 1) does not exist"),
        (["neurons=list", "neurons.list=[]"], "the choice is empty"),
        (["neurons=list"], "neurons.list: has no value; give one"),
        (["neurons.layers=[3]"], "layer 3 does not exist"),
        (["measure.shifts=[0.5,0]"], "0 is no shift"),
        (["measure.shifts=[0.5,0.5]"], "0.5 is given 2 times"),
        (["measure.shifts=[inf]"], "inf is no shift"),
        (["measure.max_shift=0.05"], "measure.step=0.1: must be from 1e-100 to measure.max_shift=0.05"),
        (["measure=intervene", "measure.edits=nowhere.json"], "measure.edits=nowhere.json: cannot be read"),
        (["measure=intervene", "measure.edits=[]"], "must be a list of at least one edit"),
    ],
)
def test_what_cannot_be_done_is_refused_when_it_is_planned(
    given: list[str], message: str, arguments: list[str], tmp_path: Path
) -> None:
    measure = [] if given[0].startswith("measure=") else ["measure=sweep"]
    refused(message, *arguments, *measure, *given, f"storage.uri={tmp_path}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
def test_the_demo_shows_neurons_straight_curves_and_plots(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neg_service.cluster.scan.run", run_here)
    asked = [*arguments, f"storage.uri={tmp_path}"]
    # The first of its two scans is done already.
    scan_here(scan_config(*asked))
    assert demo(composed("demo", asked, ScanConfig)) == 0
    shown = capsys.readouterr().out
    assert "this run was finished already" in shown
    assert shown.count("its strongest neurons") == 3
    assert re.search(r"linear +[\d.]+ % have \|r\| >= 0.95", shown)
    assert re.search(r"NEG and NeurGrad +correlation [\d.-]+, [\d.]+ % of signs agree", shown)
    assert re.search(r"NEG and gradient +correlation [\d.-]+", shown)
    plots = re.findall(r"plot: (.+\.png)", shown)
    assert [Path(plot).name for plot in plots] == ["neurgrad_over_layers.png", "neg_against_neurgrad.png"]
    assert all(Path(plot).read_bytes().startswith(b"\x89PNG") for plot in plots)
    (report,) = re.findall(r"report: (.+\.html)", shown)
    assert "strongest neurons of each prompt" in Path(report).read_text()
    sweep = table_of(tmp_path, "sweep").to_pandas()
    linear = float(re.search(r"linear +([\d.]+) %", shown)[1])  # type: ignore[index]
    assert linear == pytest.approx(100 * (sweep.r.abs() >= 0.95).mean(), abs=0.06)
