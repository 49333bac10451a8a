"""Measures of one's own: scanned, read, summed up and shown, and no file of the package knows them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hydra import compose, initialize_config_dir

import neg_service
from jobs.descriptions import describe_plan
from jobs.entry import CONF
from neg_service.cluster.prepare import prepare
from neg_service.config import ScanConfig, typed
from neg_service.errors import ConfigurationError
from neg_service.measures import find_measure, measure_of
from neg_service.measures.base import Measure, ShardInput
from neg_service.prompts.prompt import Prompt
from neg_service.report.console import aligned, describe_tables, strongest
from neg_service.report.page import Section, render
from neg_service.report.sections import sections_of
from neg_service.report.sections.loading import Loaded
from neg_service.schema import Table
from neg_service.storage.reader import Run
from tests.families import model_of
from tests.here import scan_here
from tests.measures.own.pull import Pull, PullOptions
from tests.refusals import refused
from tests.shards import measured_shard

OWN = Path(__file__).parent / "own"
ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"prompt": f"w{i} w{i + 1}", "targets": [" w7", " w8"], "answer": " w8", "id": f"p{i}"} for i in range(20, 23)]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, tiny_directory: Path) -> list[str]:
    """What is typed, but for the measure."""
    place = tmp_path_factory.mktemp("own")
    (place / "prompts.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return [
        f"model.source={tiny_directory}", "dataset=file", f"dataset.source={place / 'prompts.jsonl'}",
        "job.shard_size=2", f"storage.uri={place / 'runs'}", f"hydra.searchpath=[file://{OWN / 'conf'}]",
    ]  # fmt: skip


def configured(asked: list[str], *more: str) -> ScanConfig:
    with initialize_config_dir(CONF, version_base="1.3"):
        return typed(ScanConfig, compose("scan", overrides=[*asked, *more]))


@pytest.fixture(scope="module")
def run(asked: list[str]) -> Run:
    return scan_here(configured(asked, "measure=pull"))


def own_section(run: Run) -> Section:
    overview, section = sections_of(Loaded([run]))
    assert "tests.measures.own" in str(overview.grids[0].rows)
    assert section.title in render("report", "", [overview, section])
    return section


def test_no_file_of_the_package_knows_it() -> None:
    ours = [file for folder in ("neg_service", "jobs", "conf") for file in (ROOT / folder).rglob("*")]
    texts = [file.read_text() for file in ours if file.suffix in (".py", ".yaml", ".j2")]
    assert len(texts) > 100
    assert not any("newtons" in text or "pulls" in text or "loudness" in text for text in texts)


def test_it_is_planned(asked: list[str]) -> None:
    prepared = prepare(configured(asked, "measure=pull"))
    shown = describe_plan(prepared)
    assert "factor=2.0" in shown
    assert "tugs" in shown
    assert list(prepared.plan.bytes_of_table) == ["prompts", "pulls"]
    assert "-prompts-pull-" in prepared.uri
    assert prepare(configured(asked, "measure=pull", "measure.factor=3")).fingerprint != prepared.fingerprint
    unknown = configured(asked, "measure=pull", "+measure.force=3")
    with refused(ConfigurationError, "measure.force", says=r"Key 'force' not in 'PullOptions'"):
        prepare(unknown)


def test_a_neuron_of_it_is_read(run: Run) -> None:
    expected = neg_service.neurgrad(
        neg_service.load_model(run.about["model"]["source"]), [ROWS[1]["prompt"]], [[" w8"]]
    )  # type: ignore[list-item]
    one = run.neuron(1, 7).to_pylist()
    assert [(row["prompt_id"], row["target"], row["layer"]) for row in one] == [
        (f"p{i}", target, 1) for i in range(20, 23) for target in (" w7", " w8")
    ]
    assert abs(one[3]["pull"]) == pytest.approx(2 * abs(expected.neurgrad[0, 0, 1, 7]), rel=1e-5)
    told = json.loads((Path(run.uri) / "run.json").read_text())["tables"]["pulls"]
    assert (told["title"], told["unit"], told["values"]) == ("pull", "newtons", "pull")
    # Whoever has a part alone knows it too.
    part = pa.parquet.read_schema(Path(run.uri) / "pulls" / "shard-000000.parquet")
    assert Table.of("anything", part) == replace(run.described["pulls"], schema=part)


def test_it_is_summed_up_on_the_console(run: Run) -> None:
    shown = aligned(describe_tables(run))
    n_values = 3 * 2 * 3 * 40
    assert f"{n_values} of pull, newtons" in shown
    assert "18 in table pulls" in shown
    assert "accuracy" in shown
    best = strongest(run, "p21", " w8", 2)
    values_ln = np.array(
        [
            row["pull"]
            for row in run.table("pulls").to_table().to_pylist()
            if (row["prompt_id"], row["target"]) == ("p21", " w8")
        ]
    )
    layer, neuron = np.unravel_index(np.abs(values_ln).argmax(), values_ln.shape)
    assert (best[0].layer, best[0].index) == (layer, neuron)
    assert best[0].values == {"pull": values_ln[layer, neuron]}


def test_it_is_shown_in_the_report(run: Run) -> None:
    section = own_section(run)
    assert section.title.startswith("Pull: ")
    (grid,) = section.grids
    assert grid.head == ["prompt", "target", "layer", "neuron", "pull"]
    assert "newtons" in grid.caption
    assert grid.caption.endswith("Pulled by so much.")
    assert len(grid.rows) == 3 * 5
    (heat,) = section.pictures
    assert "newtons" in heat.caption


def test_one_with_a_row_for_each_neuron(asked: list[str]) -> None:
    run = scan_here(replace(configured(asked), measure={"name": "tests.measures.own.loudness:Loudest"}))
    table = run.table("loudest").to_table().to_pylist()
    first = table[0]
    one = run.neuron(first["layer"], first["neuron"]).to_pylist()
    assert one == [row for row in table if (row["layer"], row["neuron"]) == (first["layer"], first["neuron"])]
    assert f"{len(table)} of loudness, decibels" in aligned(describe_tables(run))
    section = own_section(run)
    (grid,) = section.grids
    own = sorted(
        (row for row in table if row["is_answer"] and row["prompt_id"] == "p20"), key=lambda row: -row["loudness"]
    )
    assert [row[2:] for row in grid.rows[:3]] == [
        (str(row["layer"]), str(row["neuron"]), f"{row['loudness']:+.3e}") for row in own
    ]
    assert "decibels" in section.pictures[0].caption


def test_one_with_sums_over_the_data_set(asked: list[str]) -> None:
    run = scan_here(replace(configured(asked), measure={"name": "tests.measures.own.loudness:Loudness"}))
    rows = run.table("loudness").to_table().to_pylist()
    assert [row["layer"] for row in rows] == [0, 1, 2, 0, 1, 2]
    assert [row["summed"] for row in run.neuron(1, 4).to_pylist()] == [
        row["summed"][4] for row in rows if row["layer"] == 1
    ]
    mean_ln = np.array([np.add(rows[i]["summed"], rows[i + 3]["summed"]) / 3 for i in range(3)])
    section = own_section(run)
    layer, neuron = np.unravel_index(mean_ln.argmax(), mean_ln.shape)
    assert section.grids[0].rows[0] == ("0", str(layer), str(neuron), f"{mean_ln.max():.3e}")
    assert section.title.startswith("Loudness over the data set")


# --- what is refused


class Short(Pull):
    """Gives too little."""

    def rows(self, shard: ShardInput) -> Iterator[tuple[int, dict[str, pa.Table]]]:
        """One table of two."""
        return ((index, {"pulls": own["pulls"]}) for index, own in super().rows(shard))


class Wide(Pull):
    """Gives numbers of another type."""

    def measure(self, shard: ShardInput) -> dict[str, pa.Table]:
        """With 64 bits in the place of 32."""
        found = super().measure(shard)
        wide = found["pulls"].schema.set(0, pa.field("prompt_id", pa.large_string(), nullable=False))
        return {**found, "pulls": found["pulls"].cast(wide)}


@pytest.mark.parametrize(
    ("measure", "refusal"),
    [
        (Short, ("measure.name", "pull", "gave the tables pulls, but says that it gives prompts, pulls")),
        (
            Wide,
            (
                "measure.name",
                "pull",
                "gave a table pulls of prompt_id: large_string not null, .* says that it is of prompt_id: string not",
            ),
        ),
    ],
)
def test_tables_that_are_not_those_that_were_said_are_refused(measure: type[Pull], refusal: tuple[Any, ...]) -> None:
    with refused(ConfigurationError, *refusal):
        measured_shard(measure(PullOptions()), model_of("Llama 2"), [Prompt("a", "w1 w2", (" w7",))])


def test_a_table_whose_values_nobody_could_find_is_refused() -> None:
    fields = {"layer": pa.int16(), "values": pa.float32()}
    with refused(ConfigurationError, setting=None, says="has no column 'pull', or no column 'layer'"):
        Table(pa.schema(list(fields.items())), "pull", values="pull")
    with refused(ConfigurationError, setting=None, says="column 'values' must be a list, a number for each neuron"):
        Table(pa.schema(list(fields.items())), "pull", values="values")
    # Of layers that differ in size the lists do, too.
    assert not Table(pa.schema([("layer", pa.int16()), ("v", pa.list_(pa.float32()))]), "v", values="v").is_by_neuron


UNFINISHED = """
from neg_service.measures.base import Measure
class Half(Measure):
    def tables(self, sizes): ...
"""
OF_BEFORE = "Options = read = check = identity = tables = cost_a_prompt = calibrate = measure = None"


@pytest.mark.parametrize(
    ("source", "name", "refusal"),
    [
        (UNFINISHED, "own.odd", ("measure.name", "own.odd", "Half lacks cost")),
        (
            OF_BEFORE,
            "own.odd",
            ("measure.name", "own.odd", r"own\.odd is a module of functions, as measures were before"),
        ),
        (
            "",
            "own.odd",
            ("measure.name", "own.odd", r"own\.odd defines no subclass of neg_service\.measures\.base\.Measure"),
        ),
        ("", "own.odd:Pull", ("measure.name", "own.odd:Pull", r"own\.odd defines no measure Pull")),
        (
            "from tests.measures.own.pull import Pull",
            "own.odd",
            ("measure.name", "own.odd", r"own\.odd defines no subclass"),
        ),
        ("", ".odd", ("measure.name", ".odd", "one of activation, aggregate_importance")),
        ("", "own..odd:Pull", ("measure.name", "own..odd:Pull", "one of activation, aggregate_importance")),
        ("", "own.none", ("measure.name", "own.none", "one of activation, aggregate_importance, control, gradient")),
    ],
)
def test_modules_without_exactly_one_measure_say_what_is_wrong(
    source: str, name: str, refusal: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "odd.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for loaded in ("own", "own.odd"):
        monkeypatch.delitem(sys.modules, loaded, raising=False)
    with refused(ConfigurationError, *refusal):
        find_measure(name)


def test_of_several_measures_in_a_module_one_is_named() -> None:
    with refused(
        ConfigurationError,
        "measure.name",
        "tests.measures.own.loudness",
        says="defines Loudest, Loudness; say which one, as .*loudness:Loudest",
    ):
        find_measure("tests.measures.own.loudness")
    assert find_measure("tests.measures.own.loudness:Loudness").__name__ == "Loudness"
    assert find_measure("tests.measures.own.pull") is Pull


def test_only_what_overrides_calibrate_is_waited_for() -> None:
    assert measure_of({"name": "sweep"}).has_to_calibrate
    assert not measure_of({"name": "neurgrad"}).has_to_calibrate
    assert not Pull(PullOptions()).has_to_calibrate


def test_a_measure_that_says_neither_rows_nor_a_shard_tells_so() -> None:
    class Empty(Pull):
        rows: Any = Measure.rows

    with pytest.raises(NotImplementedError, match="Empty has neither rows nor measure"):
        measured_shard(Empty(PullOptions()), model_of("Llama 2"), [Prompt("a", "w1 w2", (" w7",))])


def test_options_and_tables_are_known_without_torch() -> None:
    code = (
        "import sys\n"
        "from neg_service.measures import measure_of, types_of_options\n"
        "from types import SimpleNamespace\n"
        "assert 'top_k' in types_of_options()\n"
        "sizes = SimpleNamespace(n_layers=3, neurons_by_layer=(40, 40, 40))\n"
        "names = ('neurgrad', 'sweep', 'skill_scores', 'intervene')\n"
        "assert all(measure_of({'name': name}).schemas(sizes) for name in names)\n"
        "heavy = {'torch', 'transformers', 'ray', 'aiohttp'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
