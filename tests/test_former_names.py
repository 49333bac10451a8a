"""Former names: who gives one is told the present one and gets what was meant; runs of before are read as any other."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

import neg_service
from jobs.conf_folder import CONF
from jobs.entry import composed
from neg_service.cluster.prepare import prepare_again
from neg_service.config import DatasetConfig, ModelConfig, NeuronsConfig, ScanConfig, StorageConfig
from neg_service.errors import ConfigurationError, DestinationError
from neg_service.former_names import ENGINES, current_override
from neg_service.measures import find_measure
from neg_service.report.console import describe_tables
from neg_service.storage.reader import Run
from neg_service.storage.status import status_of
from neg_service.storage.verify import verify
from tests.here import scan_here
from tests.older import under_former_names
from tests.refusals import refused

MEASURES: dict[str, tuple[dict[str, Any], NeuronsConfig]] = {
    "sweep": ({"name": "sweep", "grid": "coarse"}, NeuronsConfig(choose="list", list=[[0, 3], [1, 7]])),
    "aggregate_importance": ({"name": "aggregate_importance"}, NeuronsConfig()),
}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("storage.patience_seconds=5", "storage.retry_timeout_seconds=5"),
        ("+dataset.wording=brief", "+dataset.template=brief"),
        ("dataset.wordings='a=b.toml'", "dataset.templates='a=b.toml'"),
        ("measure=strength", "measure=aggregate_importance"),
        ("measure.name=scores", "measure.name=skill_scores"),
        ("measure=strength,neurgrad,votes", "measure=aggregate_importance,neurgrad,neuron_predictions"),
        ("++measure.name='scores'", "++measure.name='skill_scores'"),
        ('measure=choice(strength, "sweep")', 'measure=choice(aggregate_importance, "sweep")'),
        ("probe.contexts=[{wording: brief}]", "probe.contexts=[{template: brief}]"),
    ],
)
def test_a_former_setting_is_told_and_taken(given: str, meant: str, caplog: pytest.LogCaptureFixture) -> None:
    assert current_override(given) == meant
    assert "by now" in caplog.text
    caplog.clear()
    assert current_override(meant) == meant
    assert not caplog.text


def test_a_command_takes_former_settings() -> None:
    config = composed("scan", ["storage.patience_seconds=7", "measure=strength", "storage.uri=/tmp/x"], ScanConfig)
    assert config.storage.retry_timeout_seconds == 7
    assert config.measure.name == "aggregate_importance"


def test_a_measure_of_ones_own_keeps_its_name() -> None:
    for own in ("my.votes", "votes.mine", "scores:Mine", "high_scores"):
        assert current_override(f"measure.name={own}") == f"measure.name={own}"


def test_a_command_takes_former_settings_of_a_yaml_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    conf = shutil.copytree(CONF, tmp_path / "conf")
    (conf / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nmeasure: {name: strength}\nstorage: {patience_seconds: 5}\ndataset: {wording: brief}\n"
    )
    monkeypatch.setattr("jobs.entry.CONF", str(conf))
    config = composed("scan", ["dataset=mceval8k/ner", "experiment=mine"], ScanConfig)
    assert (config.measure.name, config.dataset.template) == ("aggregate_importance", "brief")
    assert dict(config.storage) == {"uri": "results", "endpoint_url": None, "retry_timeout_seconds": 5}
    assert caplog.text.count("by now") == 3


def test_help_says_the_present_names_of_measures_and_engines() -> None:
    scan, check = ((Path(CONF) / f"{name}.yaml").read_text() for name in ("scan", "check"))
    measures = [file.stem for file in (Path(CONF) / "measure").iterdir()]
    assert [name for name in measures if not re.search(rf"\b{name}\b", scan)] == []
    assert [name for name in ENGINES.values() if not re.search(rf"\b{name}\b", check)] == []


def test_a_former_measure_is_told_to_who_writes_it_in_a_program() -> None:
    with refused(ConfigurationError, "measure.name", "votes", "is called neuron_predictions by now"):
        find_measure("votes")


@pytest.fixture(scope="module", params=sorted(MEASURES))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_directory: Path) -> list[Run]:
    """A run, and the same as it was stored under former names."""
    place = tmp_path_factory.mktemp("named")
    (place / "rows.jsonl").write_text('{"prompt": "w1 w2", "targets": [" w3", " w4"], "answer": " w3"}\n')
    measure, neurons = MEASURES[request.param]
    config = ScanConfig(
        # Of before, when there was no difference arithmetic.
        model=ModelConfig(source=str(tiny_directory), engine="shared_prefix"),
        dataset=DatasetConfig(source=str(place / "rows.jsonl")),
        measure=measure,
        neurons=neurons,
        storage=StorageConfig(uri=str(place / "results")),
    )
    run = neg_service.open_run(scan_here(config).uri)
    run.directory.record_failure(5, "no room", 3)
    under_former_names(Path(shutil.copytree(run.uri, place / "before")))
    return [run, neg_service.open_run(place / "before")]


def test_a_run_of_before_is_read_as_any_other(both: list[Run]) -> None:
    run, before = both
    assert before.tables == run.tables
    assert before.tables != list(before.directory.tables) or "sweep" in before.tables
    assert before.config["measure"]["name"] == run.config["measure"]["name"]
    assert before.about["engine"] == run.about["engine"]
    assert before.directory.failed() == run.directory.failed() != {}
    assert describe_tables(before) == describe_tables(run)
    name = run.values_of_neurons[0]
    whole = run.table(name).to_table().drop_columns(["expert"])
    assert before.table(name).to_table().equals(whole)
    assert before.table(name).schema.names == whole.schema.names
    value = run.described[name].values
    assert before.table(name, columns=[value, "layer"]).to_table().equals(whole.select([value, "layer"]))
    of_layer = pc.field("layer") == 1
    assert before.table(name, filter=of_layer).to_table().equals(whole.filter(of_layer))
    assert before.neuron(1, 7).equals(run.neuron(1, 7).drop_columns(["expert"]))


def test_what_cannot_be_done_with_a_run_of_before_is_told(both: list[Run]) -> None:
    run, before = both
    name = run.values_of_neurons[0]
    with refused(ConfigurationError, setting=None, says="was stored with the column .* read them one by one"):
        neg_service.open_runs([run.uri, before.uri]).table(name)
    if name == "sweep":
        with refused(ConfigurationError, "filter", says="largest_delta_p"):
            before.table(name, filter=pc.field("max_abs_delta_p") > 0)
        assert before.table(name, filter=pc.field("largest_delta_p") >= 0).count_rows() == 4
    with refused(DestinationError, setting=None, says="earlier version .schema 3"):
        prepare_again(before, ScanConfig())
    assert [finding.key for finding in verify(before.directory.store).findings] == []
    assert [table.name for table in status_of(before).tables] == run.tables
