"""Sections of a report against what the runs' tables say, for each kind of run; and the page that they make."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from jobs.report import write_report
from neg_service.config import DatasetConfig, JobConfig, ModelConfig, NeuronsConfig, ScanConfig, StorageConfig
from neg_service.errors import DestinationError, StorageError
from neg_service.report import figures
from neg_service.report.console import agreement, describe_tables
from neg_service.report.page import Grid, Picture, Section, render
from neg_service.report.sections import sections_of
from neg_service.report.sections.loading import Loaded, load
from neg_service.report.sections.overview import overview
from neg_service.studies.kinds import STUDY_VIEWS
from tests.here import scan_here
from tests.quantized_checkpoints import KINDS, make
from tests.refusals import refused
from tests.report.conftest import unrendered
from tests.report.runs import ROWS, grid_of, only_section, run_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize("name", ["neurgrad", "gradient_x_activation"])
def test_the_strongest_neurons_are_those_of_the_table(
    place: Path, tiny_directory: Path, name: str, answered: bool
) -> None:
    run = run_of(place, tiny_directory, {"name": name}, answered=answered)
    section = only_section(run)
    found = grid_of(section, "strongest")
    table = run.table(name, filter=pc.field("is_answer") if answered else None).to_table()
    pairs = list(dict.fromkeys(zip(table["prompt_id"].to_pylist(), table["target"].to_pylist(), strict=True)))
    assert len(pairs) == (5 if answered else 15)
    assert len(found) == 5 * len(pairs)
    texts = {row["id"]: row["prompt"] for row in ROWS}
    for place_of, (prompt, target) in enumerate(pairs):
        own = table.filter((pc.field("prompt_id") == prompt) & (pc.field("target") == target)).sort_by("layer")
        values_ln = np.array(own[name].to_pylist())
        best = np.argsort(-np.abs(values_ln), axis=None)[:5]
        shown = found[5 * place_of : 5 * place_of + 5]
        assert {(row["prompt"], row["target"]) for row in shown} == {(texts[prompt], target)}
        assert [(int(row["layer"]), int(row["neuron"])) for row in shown] == list(
            zip(*(axis.tolist() for axis in np.unravel_index(best, values_ln.shape)), strict=True)
        )
        what = "NeurGrad" if name == "neurgrad" else "gradient × activation"
        assert [row[what] for row in shown] == [f"{value:+.3e}" for value in values_ln.ravel()[best]]
    assert [picture.name for picture in section.pictures] == ["strength-0"]


@pytest.mark.parametrize("name", ["gradient", "activation"])
def test_a_neuron_of_a_baselines_run_can_be_loaded(place: Path, tiny_directory: Path, name: str) -> None:
    run = run_of(place, tiny_directory, {"name": name})
    whole = run.table(name, filter=pc.field("layer") == 1).to_table().to_pylist()
    one = run.neuron(1, 7).to_pylist()
    assert [row[name] for row in one] == [row[name][7] for row in whole]
    assert len(one) == 15


@pytest.mark.parametrize(
    "measure",
    [
        {"name": "neurgrad"},
        {"name": "neurgrad", "keep": "top_k", "top_k": 8},
        {"name": "random"},
        {"name": "aggregate_importance"},
    ],
    ids=["values", "strongest", "baseline", "sums"],
)
def test_a_run_whose_tables_say_nothing_of_themselves_is_read_and_shown_as_any_other(
    place: Path, tiny_directory: Path, measure: dict[str, Any], tmp_path: Path
) -> None:
    run = run_of(place, tiny_directory, measure)
    bare = {name: own.with_metadata(None) for name, own in run.schemas.items()}
    before = dataclasses.replace(run, schemas=bare)
    assert before.neuron(1, 7).equals(run.neuron(1, 7))
    assert describe_tables(before) == describe_tables(run)
    shown, expected = only_section(before), only_section(run)
    assert shown.title == expected.title
    assert [grid.rows for grid in shown.grids] == [grid.rows for grid in expected.grids]
    assert [grid.head for grid in shown.grids] == [grid.head for grid in expected.grids]
    assert [picture.caption for picture in shown.pictures] == [picture.caption for picture in expected.pictures]


def test_a_sweep_is_shown_with_its_curves_whichever_way_neurons_were_shifted(place: Path, tiny_directory: Path) -> None:
    for shift, unit in (("magnitude", "|activation|"), ("signed", "a unit of activation")):
        measure = {"name": "sweep", "grid": "coarse", "shift": shift, "keep_curves": True}
        run = run_of(place, tiny_directory, measure, NeuronsConfig([0, 2], choose="sample", count=7))
        section = only_section(run)
        table = run.table("sweep", filter=pc.field("is_answer")).to_table().to_pylist()
        best = sorted((row for row in table if row["prompt_id"] == "p22"), key=lambda row: -abs(row["neg"]))[:5]
        shown = [row for row in grid_of(section, "swept") if row["prompt"].startswith("w22")]
        assert [(row["layer"], row["neuron"], row["NEG"]) for row in shown] == [
            (str(row["layer"]), str(row["neuron"]), f"{row['neg']:+.3e}") for row in best
        ]
        assert [picture.name for picture in section.pictures] == ["strength-0", "sweep-0", "curves-0"]
        assert all(unit in picture.caption for picture in section.pictures[:2])


def test_agreement_is_of_all_rows_however_they_come(place: Path, tiny_directory: Path) -> None:
    run = run_of(place, tiny_directory, {"name": "sweep", "grid": "coarse"}, NeuronsConfig(choose="sample", count=7))
    table = run.table("sweep").to_table()
    expected = np.corrcoef(table["neg"].to_numpy(), table["neurgrad"].to_numpy())[0, 1]
    told = dict(agreement(run))
    assert told["NEG and NeurGrad"].startswith(f"correlation {expected:.4f}")
    assert told["curves"].startswith(f"{table.num_rows}:")


@pytest.mark.usefixtures("rendered")
def test_strongest_neurons_alone_strength_and_edits(place: Path, tiny_directory: Path) -> None:
    run = run_of(place, tiny_directory, {"name": "neurgrad", "keep": "top_k", "top_k": 8})
    everything = only_section(run_of(place, tiny_directory, {"name": "neurgrad"}))
    section = only_section(run)
    same = [[row[key] for key in ("prompt", "layer", "neuron", "NeurGrad")] for row in grid_of(section, "strongest")]
    assert same == [
        [row[key] for key in ("prompt", "layer", "neuron", "NeurGrad")] for row in grid_of(everything, "strongest")
    ]
    assert [picture.name for picture in section.pictures] == ["strongest-layers-0"]

    run = run_of(place, tiny_directory, {"name": "aggregate_importance"})
    first = grid_of(only_section(run), "strongest")[0]
    values = run_of(place, tiny_directory, {"name": "neurgrad"}).table("neurgrad").to_table()
    frame = values.to_pandas()
    strength_ln = np.mean(
        [
            np.max([np.abs(np.stack(own.sort_values("layer")["neurgrad"])) for _, own in of.groupby("target")], 0)
            for _, of in frame.groupby("prompt_id")
        ],
        0,
    )
    assert (int(first["layer"]), int(first["neuron"])) == np.unravel_index(strength_ln.argmax(), strength_ln.shape)
    assert float(first["aggregate importance"]) == pytest.approx(strength_ln.max(), rel=1e-3)

    edits = [{"name": "off", "neurons": [[0, 3], [2, 5]], "scale": 0.0}, {"neurons": [[1, 1]], "shift": 2.0}]
    run = run_of(place, tiny_directory, {"name": "intervene", "edits": edits})
    rows = grid_of(only_section(run), "edits")
    table = run.table("intervene", filter=pc.field("is_answer")).to_table().to_pandas()
    for row, (_, own) in zip(rows, table.groupby("edit", sort=False), strict=True):
        assert row["edit"] == own.edit.iloc[0]
        assert row["prompts × targets"] == "5"
        assert row["change of p, mean"] == f"{own.delta_p.astype(float).mean():+.3e}"
        assert row["right after, %"] == f"{100 * (own.prediction == own.target_index).mean():.1f}"
    assert [row["neurons"] for row in rows] == ["2", "1"]
    assert [row["edit"] for row in rows] == ["off", "edit-1"]
    assert [row["what"] for row in rows] == ["scale 0 of 0:3, 2:5", "shift 2 of 1:1"]
    (open_ended,) = only_section(
        run_of(place, tiny_directory, {"name": "intervene", "edits": edits}, answered=False)
    ).grids
    assert open_ended.rows[0][6:8] == ("-", "-")
    assert open_ended.rows[0][-1] == "15"


def test_quantised_weights_are_said_to_be(place: Path, tiny_directory: Path, tmp_path: Path) -> None:
    quantised, _ = make(KINDS["gptq"], tmp_path)
    run = run_of(place, quantised, {"name": "neurgrad"})
    made = {"method": "gptq", "tensors": 14, "activations": "not quantised"}
    assert run.about["model"]["dequantised"] == made
    plain = run_of(place, tiny_directory, {"name": "neurgrad"})
    assert "dequantised" not in plain.about["model"]
    text = overview(Loaded([run, plain], [])).text
    assert f"Weights of {quantised}: dequantised from gptq (14 tensors); activations: not quantised." in text
    assert text.count("dequantised") == 1
    # Planned without its files, as a checkpoint of the hub is, its replicas know how many all the same.
    run.about["model"]["dequantised"], run.about["dequantised"] = {**made, "tensors": None}, made
    assert overview(Loaded([run, plain], [])).text == text


def test_a_run_that_is_not_done_shows_what_it_has(place: Path, tiny_directory: Path) -> None:
    run = run_of(place, tiny_directory, {"name": "neurgrad", "keep": "answer"}, shards=1)
    overview, section = sections_of(Loaded([run]))
    (row,) = next(grid.rows for grid in overview.grids if grid.title == "Runs")
    assert "1 of 3" in row
    machines = next(grid.rows for grid in overview.grids if grid.title == "Software and machine")
    assert re.search(r"'replicas ran on', 'cpu \(.+\), 1 threads'", str(machines))
    assert len({row["prompt"] for row in grid_of(section, "strongest")}) == 2
    nothing = run_of(place, tiny_directory, {"name": "neurgrad", "basis": "gate"}, shards=0)
    assert [own.title for own in sections_of(Loaded([nothing]))] == ["What was run"]


def test_several_runs_stand_on_one_page_and_copies_are_found(place: Path, tiny_directory: Path, tmp_path: Path) -> None:
    first = run_of(place, tiny_directory, {"name": "neurgrad"})
    second = run_of(place, tiny_directory, {"name": "activation"})
    path = Path(write_report([first.uri, second.uri, f"{first.uri}/"], str(tmp_path / "out"), None, "A <title>"))
    page = path.read_text()
    assert page.count("<h2>") == 3
    assert "A &lt;title&gt;" in page
    assert "w22 &lt;b&gt;w23&lt;/b&gt;" in page
    assert "<b>w23</b>" not in page
    assert {picture.name for picture in (tmp_path / "out" / "figures").iterdir()} == {
        "strength-0.png", "strength-0-dark.png", "strength-1.png", "strength-1-dark.png",
    }  # fmt: skip
    with refused(DestinationError, "out", says="is a file, not a folder"):
        write_report([first.uri], str(path), None)


def test_wrong_targets_at_the_end_of_a_shard_harm_nothing(place: Path, tiny_directory: Path) -> None:
    """171 prompts of three targets are 513 rows of each layer, of which the last one alone is a batch."""
    rows = [{"prompt": f"w{i % 50}", "targets": [" w7", " w8", " w11"], "answer": " w7"} for i in range(171)]
    (place / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = ScanConfig(
        model=ModelConfig(source=str(tiny_directory)),
        dataset=DatasetConfig(source=str(place / "many.jsonl")),
        neurons=NeuronsConfig([1]),
        storage=StorageConfig(uri=str(place / "runs")),
        job=JobConfig(shard_size=171),
    )
    assert len(grid_of(only_section(scan_here(config)), "strongest")) == 5 * 171


def test_a_map_shows_where_the_target_begins_and_accuracy_is_told_by_token_too(
    place: Path, tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"prompt": "w20 w21 w22", "targets": [" w7 w8 w9", " w8"], "answer": " w7 w8 w9", "id": "long"},
        {"prompt": "w20 w21", "targets": [" w7", " w8"], "answer": " w8", "id": "short"},
    ]
    (place / "longer.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = ScanConfig(
        model=ModelConfig(source=str(tiny_directory)),
        dataset=DatasetConfig(source=str(place / "longer.jsonl"), not_one_token="sequence"),
        measure={"name": "positions"},
        storage=StorageConfig(uri=str(place / "runs")),
    )
    run, drawn = scan_here(config), []
    real = figures.position_map
    monkeypatch.setattr(figures, "position_map", lambda *given: [drawn.append((given[2], given[4])), real(*given)][1])
    pictures = only_section(run).pictures
    assert [(len(tokens), n) for tokens, n in drawn] == [(5, 2), (2, 0)]
    assert ["Behind the line" in picture.caption for picture in pictures] == [True, False]
    names = [name for name in run.schemas["prompts"].names if name != "target_sequences"]
    older = pa.schema([run.schemas["prompts"].field(name) for name in names])
    before = dataclasses.replace(run, schemas={**run.schemas, "prompts": older})
    assert not any("Behind the line" in picture.caption for picture in only_section(before).pictures)
    found = run.table("prompts").to_table().to_pylist()
    right, by_token = (
        sum(row[name] == row["answer"] for row in found) for name in ("prediction", "prediction_per_token")
    )
    told = dict(describe_tables(run))["accuracy"]
    assert told == f"{50 * right:.1f} % ({right} of 2); by the mean over a target's tokens {50 * by_token:.1f} %"
    plain = run_of(place, tiny_directory, {"name": "neurgrad"})
    assert "mean" not in dict(describe_tables(plain))["accuracy"]


def test_runs_of_a_study_are_found_beside_it_wherever_both_are(
    place: Path, tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(place, tiny_directory, {"name": "neurgrad"})
    shutil.copytree(run.uri, tmp_path / run.name)
    (tmp_path / "x-study").mkdir()
    named = {"runs": {"neurgrad": f"/gone/{run.name}"}}
    (tmp_path / "x-study" / "study.json").write_text(json.dumps(named))
    monkeypatch.chdir(tmp_path)
    for uri in ("x-study", "./x-study/", str(tmp_path / "x-study")):
        (study,) = load([uri], None, STUDY_VIEWS).studies
        assert study.runs["neurgrad"].fingerprint == run.fingerprint
        assert study.name == "x-study"
    shutil.rmtree(tmp_path / run.name)
    with refused(DestinationError, "runs", "x-study", says=r"its run /gone/\S+ \(neurgrad\) is neither there nor"):
        load(["x-study"], None, STUDY_VIEWS)


def test_of_a_list_of_runs_the_first_says_with_what_it_was_computed(
    place: Path, tiny_directory: Path, tmp_path: Path
) -> None:
    run = run_of(place, tiny_directory, {"name": "neurgrad"})
    (tmp_path / "probe.json").write_text(json.dumps({"runs": [run.uri, "/gone"]}))
    loaded = load([str(tmp_path)], None, STUDY_VIEWS)
    (study,) = loaded.studies
    assert [(what, own.uri) for what, own in study.runs.items()] == [("first", run.uri)]
    # It has no section of its own, and is not listed among the runs.
    assert (loaded.runs, study.names_runs) == ([], False)


def test_damage_is_one_line(place: Path, tiny_directory: Path, tmp_path: Path) -> None:
    run = run_of(place, tiny_directory, {"name": "neurgrad"})
    copy = tmp_path / run.name
    shutil.copytree(run.uri, copy)
    part = next(iter(sorted((copy / "neurgrad").iterdir())))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 255
    part.write_bytes(content)
    with refused(StorageError, setting=None, says="its parts cannot be read"):
        write_report([str(copy)], str(tmp_path / "out"), None)


def test_what_a_page_is_made_of_is_escaped() -> None:
    grid = Grid("<i>", "<i>", ("<i>",), [("<i>",)], is_interactive=True, name="a")
    picture = Picture("b", "<i>", "<i>", '"<i>', {"light": b"1", "dark": b"2"})
    page = render("<i>", "<i>", [Section("c", "<i>", "<i>", [grid], [picture])])
    assert "<i>" not in page
    assert "data:image/png;base64,MQ==" in page
    assert "data:image/png;base64,Mg==" in page


@pytest.mark.usefixtures("rendered")
def test_figures_can_hold_any_target() -> None:
    row = {
        "shifts": [-1.0, 1.0],
        "delta_p": [-0.1, 0.1],
        "neurgrad": 0.1,
        "layer": 0,
        "neuron": 1,
        "prompt_id": "a",
        "target": " 日本 $x^2$",
    }
    images = figures.drawn(figures.curves([row]))
    assert set(images) == {"light", "dark"}
    assert figures._drawable("né 日") == "né \\u65e5"


@pytest.mark.usefixtures("rendered")
def test_a_probe_is_shown_with_its_studies(tmp_path: Path) -> None:
    """Tables as a probe leaves them, of two tasks."""
    tasks = ["agnews", "ner"]
    interval = {"low": 0.3, "high": 0.5, "n_prompts": 100}
    accuracies = [
        {"task": task, "genre": "classification", "probe": probe, "n_neurons": n, "n_train": 50, "split": split,
         "accuracy": 0.4, "is_chosen": n != 4, **interval}
        for task in tasks for probe in ("magnitude", "polarity") for n in (1, 4) for split in ("valid", "test")
    ]  # fmt: skip
    neurons = [
        {"task": task, "score_name": "magnitude", "rank": rank, "layer": 1, "neuron": rank, "score": 9 - rank,
         "polarity": 1, "n_train": 50}
        for task in tasks for rank in range(30)
    ]  # fmt: skip
    tables = {
        "accuracy": accuracies,
        "efficiency": accuracies,
        "neurons": neurons,
        "flexibility": [
            {"task": task, "genre": "", "probe": "magnitude", "first_rank": rank, "n_neurons": 4, "accuracy": 0.4,
             **interval}
            for task in tasks for rank in (0, 4)
        ],
        "interdependency": [
            {"task": a, "genre": "", "suppressed": b, "n_neurons": 4, "shift": 1.0, "accuracy_before": 0.5,
             "accuracy": 0.4, **interval}
            for a in tasks for b in tasks
        ],
        "overlap": [
            {"task": a, "other_task": b, "score_name": "magnitude", "n_neurons": 4, "shared": 1, "by_chance": 0.01}
            for a in tasks for b in tasks if a != b
        ],
    }  # fmt: skip
    folder = tmp_path / "a-probe"
    folder.mkdir()
    for name, rows in tables.items():
        pa.parquet.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    about = {"model": {"source": "m", "dtype": "float32"}, "dataset": {"source": "s", "task": tasks}, "runs": []}
    (folder / "probe.json").write_text(json.dumps(about))
    page = Path(write_report([str(folder)], str(tmp_path / "out"), None)).read_text()
    for name in ("accuracy", "accuracy-by-neurons", "efficiency", "flexibility", "interdependency"):
        name = f"skill-{name}"
        assert f'id="figure-{name}"' in page
        assert (tmp_path / "out" / "figures" / f"{name}-dark.png").exists()
    assert "s: agnews, ner" in page
    assert page.count("<td>agnews</td>") == page.count("<td>ner</td>")
    shutil.copytree(folder, tmp_path / "elsewhere" / "a-probe")
    with unrendered():
        both = write_report([str(folder), str(tmp_path / "elsewhere" / "a-probe")], str(tmp_path / "both"), None)
    identifiers = re.findall(r'\bid="([^"]+)"', Path(both).read_text())
    assert len(identifiers) == len(set(identifiers))
