"""Skill neurons by the commands that a person types, on a task with planted ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from hydra import compose, initialize_config_dir

import neg_service
from jobs.entry import CONF, composed
from jobs.probe import ProbeConfig, probe
from jobs.tasks import TasksConfig, tasks
from neg_service.errors import ConfigurationError
from tests.here import run_here
from tests.skills import PLANTED, PLANTED_WORDINGS, planted_model, planted_rows, write_split
from tests.tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model, a task and templates on disk."""
    place = tmp_path_factory.mktemp("probe")
    planted_model(place / "model")
    (place / "templates.toml").write_text(PLANTED_WORDINGS)
    for i, (split, count) in enumerate((("train", 50), ("valid", 26), ("test", 26))):
        write_split(place / "data", "imdb", split, planted_rows(count, 100 * i))
    return [
        "dataset=mceval8k",
        "dataset.task=imdb",
        f"dataset.source={place / 'data'}",
        f"dataset.templates={place / 'templates.toml'}",
        f"model.source={place / 'model'}",
        f"storage.uri={place / 'results'}",
        "cluster.cpus_per_replica=1",
    ]


@pytest.mark.faults
def test_a_probe_and_again(
    settings: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [
        "dataset=mceval8k/imdb",
        *settings[2:],
        "probe.sizes=[1,3,8]",
        "probe.shard_size=24",
        "probe.block=3",
        "probe.blocks=2",
        "probe.suppressed=3",
        "probe.suppress_by=200",
        "cluster.replicas.max=1",
    ]
    efficiency = [*asked, "probe.studies=[efficiency]"]
    # Of three scans in this process two are lost, which replicas do again.
    with monkeypatch.context() as patch:
        patch.setattr("neg_service.cluster.scan.run", run_here)
        assert probe(composed("probe", efficiency, ProbeConfig)) == 0
    before = capsys.readouterr().out
    place = Path(before.rsplit("results: ", 1)[1].strip()).parent
    lost = [run for split in ("valid", "test") for run in place.glob(f"model-imdb-{split}-*")]
    assert len(lost) == 2
    for run in lost:
        shutil.rmtree(run)
    # With Ray of its own, as the command has.
    assert probe(composed("probe", efficiency, ProbeConfig)) == 0
    shown = capsys.readouterr().out
    for expected in ("classification  imdb", "100.0 (1)", "efficiency: "):
        assert expected in shown, shown
    assert shown == before
    assert [neg_service.open_run(run).done() for run in lost] == [{0, 1}] * 2
    # The same settings find all scans done, compute nothing, and write the same.
    assert probe(composed("probe", efficiency, ProbeConfig)) == 0
    assert not ray.is_initialized()
    assert capsys.readouterr().out == before

    # All studies need one scan more, for which this process will do.
    monkeypatch.setattr("neg_service.cluster.scan.run", run_here)
    asked.append("probe.studies=[efficiency,flexibility,interdependency]")
    assert probe(composed("probe", asked, ProbeConfig)) == 0
    shown = capsys.readouterr().out
    for expected in ("classification  imdb", "100.0 (1)", "efficiency: ", "flexibility: ", "interdependency: "):
        assert expected in shown, shown
    results = Path(shown.rsplit("results: ", 1)[1].strip())
    tables = {path.stem for path in results.glob("*.parquet")}
    assert tables == {"accuracy", "neurons", "efficiency", "flexibility", "interdependency"}
    best = pq.read_table(results / "neurons.parquet").to_pylist()[:3]
    assert {(row["layer"], row["neuron"]): row["polarity"] for row in best} == PLANTED
    plots = sorted(path.name for path in (results / "plots").glob("*.png"))
    assert plots == ["accuracy_by_neurons.png", "efficiency.png", "flexibility.png", "interdependency.png"]
    about = json.loads((results / "probe.json").read_text())
    assert all((Path(uri) / "run.json").is_file() for uri in about["runs"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("dataset.source=NOT_WHOLE", "imdb has no split train (classification/imdb/train.json); there is test"),
        ("dataset.task=imbd", "dataset.task=imbd: is unknown; did you mean imdb?"),
        ("dataset.shots=30", "dataset.shots=30: imdb has 25 rows for label ' w7' in its train split; use at most 25"),
        ("probe.probes=[forests]", "did you mean forest?"),
        ("dataset.templates=null", "targets ' negative' and ' positive' are the same token"),
    ],
)
def test_what_cannot_be_probed_is_told_in_one_line(
    settings: list[str], changed: str, message: str, tmp_path: Path
) -> None:
    write_split(tmp_path, "imdb", "test", planted_rows(4))
    overrides = [*settings, changed.replace("NOT_WHOLE", str(tmp_path))]
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("probe", overrides=overrides)
    with pytest.raises(ConfigurationError) as error:
        probe(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_tasks_are_listed_and_an_example_is_printed(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert tasks(composed("tasks", ["task=imdb", *settings[2:5]], TasksConfig)) == 0
    shown = capsys.readouterr().out
    assert "--- imdb, template default: 26 prompts of valid; this is imdb/valid/" in shown
    assert "the labels are the tokens 'w7', 'w8'" in shown
    assert tasks(composed("tasks", [], TasksConfig)) == 0
    listed = capsys.readouterr().out
    assert listed.count("\n") == 23
    assert "amazon-review-multi       5  en, de, es, fr, zh" in listed


def test_the_example_of_a_masked_model_has_its_mask(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("BERT").model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with initialize_config_dir(CONF, version_base="1.3"):
        tasks(compose("tasks", overrides=["task=imdb", *settings[2:4], f"model.source={tmp_path}"]))
    shown = capsys.readouterr().out
    assert " [MASK].\n--- labels 'w7' or 'w8'; right is 'w" in shown
    assert "the labels are the tokens 'w7', 'w8'" in shown
