"""Neurons of a run: resolved when it is planned, kept beside it, and planned again from there."""

from __future__ import annotations

import json
import logging
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pytest
from omegaconf import OmegaConf
from transformers import LlamaForCausalLM

import neg_service
from jobs.verify import verify as verify_command
from neg_service.cluster import scan
from neg_service.cluster.messages import WorkerSpec
from neg_service.cluster.prepare import Prepared, prepare, prepare_again
from neg_service.cluster.ranking import strongest
from neg_service.config import DatasetConfig, ModelConfig, NeuronsConfig, ScanConfig, StorageConfig
from neg_service.errors import ConfigurationError, DestinationError, StorageError
from neg_service.neurons import NeuronSet
from neg_service.storage.neurons import NEURONS_FILE
from neg_service.storage.run import RUN_FILE
from neg_service.storage.stores import open_store
from neg_service.storage.verify import verify
from neg_service.studies.scans import StudyScans
from tests.here import run_here, scan_here
from tests.refusals import refused
from tests.tiny_models import tiny_model, tiny_tokenizer

FEW = [[0, 5], [2, 1], [2, 39]]


@pytest.fixture
def config(tiny_directory: Path, tmp_path: Path) -> ScanConfig:
    """A sweep of three prompts in two shards."""
    words = tmp_path / "words.jsonl"
    words.write_text("".join(f'{{"prompt": "w{i} w2", "targets": [" w3", " w4"]}}\n' for i in range(3)))
    found = ScanConfig(ModelConfig(str(tiny_directory)), DatasetConfig(str(words)))
    found.measure = {"name": "sweep", "shifts": [-1.0, 1.0]}
    found.storage = StorageConfig(str(tmp_path / "results"))
    found.job.shard_size = 2
    return found


def listed(config: ScanConfig, neurons: Any) -> ScanConfig:
    return replace(config, neurons=NeuronsConfig(choose="list", list=neurons))


def begun(prepared: Prepared) -> Path:
    """What is there when run.json is written."""
    scan._begin(prepared, open_store(prepared.uri))
    return Path(prepared.uri)


def repaired(run: Path) -> int:
    """What `jobs.verify repair=true` ends with."""
    given = {"run": str(run), "repair": True, "model": {"device": "auto"}, "dataset": {}, "cluster": {}}
    return verify_command(OmegaConf.create({**given, "storage": {"endpoint_url": None, "retry_timeout_seconds": 1.0}}))


def test_thousands_of_neurons_of_a_file_lie_beside_a_small_run_json(config: ScanConfig, tmp_path: Path) -> None:
    sizes = {**tiny_model("Llama 2").model.config.to_dict(), "intermediate_size": 2500}
    LlamaForCausalLM(type(tiny_model("Llama 2").model.config)(**sizes)).save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    many = [[layer, n] for layer in range(3) for n in range(2500)][:7000]
    table = pa.table({"layer": [layer for layer, _ in many], "neuron": [n for _, n in many]})
    pyarrow.csv.write_csv(table, tmp_path / "mine.csv")
    config.model.source, config.job.limit = str(tmp_path / "wide"), 1
    config.measure = {"name": "sweep", "shifts": [1.0]}
    config = listed(config, str(tmp_path / "mine.csv"))
    run = scan_here(config)
    place = Path(run.uri)
    assert sorted(path.name for path in place.iterdir()) == [
        "neurons.parquet", "prompts", "run.copy.json", "run.json", "sweep",
    ]  # fmt: skip
    content = (place / RUN_FILE).read_bytes()
    assert len(content) < 20_000
    parsed = json.loads(content)
    said = parsed["neurons"]
    assert (said["source"], said["count"]) == (str(tmp_path / "mine.csv"), 7000)
    assert parsed["identity"]["neurons"]["sha256"] == said["sha256"]
    assert parsed["request"]["neurons"]["list"] == str(tmp_path / "mine.csv")
    assert run.listed_neurons() == NeuronSet.from_pairs(many)
    assert run.neuron(2, 1999).num_rows == 2
    assert run.neuron(2, 2000).num_rows == 0
    # The same command goes on with it, and a repair plans it from itself when the list is gone.
    assert prepare(config).uri == run.uri
    assert verify(run.directory.store).is_clean
    (tmp_path / "mine.csv").unlink()
    again = prepare_again(run, ScanConfig())
    assert (again.uri, again.fingerprint) == (run.uri, run.fingerprint)
    assert again.neurons == run.listed_neurons()
    # What a replica gets has them as numbers, 24 bytes each.
    assert len(pickle.dumps(WorkerSpec(again.config, again.info.identity, 1))) < 24 * 7000 + 10_000


def test_a_sample_is_drawn_when_the_run_is_planned_and_all_are_not_listed(config: ScanConfig) -> None:
    drawn = prepare(replace(config, neurons=NeuronsConfig(choose="sample", count=4, seed=3)))
    assert isinstance(drawn.config.neurons.list, NeuronSet)
    assert len(drawn.config.neurons.list) == 12
    assert drawn.neurons is None
    assert drawn.request["neurons"]["list"] is None
    assert prepare(replace(config, neurons=NeuronsConfig())).config.neurons.list is None
    with pytest.raises(ConfigurationError, match=r"neurons\.count=41: the choice must be from 1 to 40"):
        prepare(replace(config, neurons=NeuronsConfig(choose="sample", count=41)))


@pytest.mark.parametrize("neurons", [FEW, FEW[::-1], [[0, None, 5], [2, None, 1], [2, None, 39]]])
def test_inline_pairs_and_a_set_are_the_same_run(config: ScanConfig, neurons: list[Any]) -> None:
    as_object = prepare(listed(config, NeuronSet.from_pairs(FEW)))
    assert prepare(listed(config, neurons)).identity == as_object.identity
    # As runs have been named before there were sets.
    assert as_object.identity["neurons"] == {
        "layers": [0, 2], "choose": "list", "count": 3,
        "sha256": "dcbedc23b520f88d53fd16ca82e51a7b8b488ca229f511f651c19f589fe90be7",
    }  # fmt: skip


def test_a_study_hands_a_scan_its_neurons_as_an_object(config: ScanConfig) -> None:
    scans = StudyScans(config, scan_here)
    settings = scans.settings_of(config.measure, NeuronsConfig(choose="list", list=NeuronSet.from_pairs(FEW)))
    run = scans.run("a sweep", settings)
    rows = run.table("sweep").to_table()
    assert {(a, b) for a, b in zip(rows["layer"].to_pylist(), rows["neuron"].to_pylist(), strict=True)} == {
        (layer, n) for layer, n in FEW
    }
    assert rows["expert"].null_count == rows.num_rows
    assert run.listed_neurons() == NeuronSet.from_pairs(FEW)


def test_neurons_by_task_and_experts_are_refused_by_a_sweep(config: ScanConfig) -> None:
    by_task = NeuronSet.by_task({"imdb": NeuronSet.from_pairs(FEW)})
    with pytest.raises(ConfigurationError, match=r"neurons\.list: measure=sweep takes the same for all tasks"):
        prepare(listed(config, by_task))
    with pytest.raises(ConfigurationError, match=r"\(2, 1, 0\) does not exist; layer 2 has no experts"):
        prepare(listed(config, [[2, 1, 0]]))


def test_lost_neurons_come_from_their_source_or_are_told(
    config: ScanConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "mine.csv"
    source.write_text("layer,neuron\n0,5\n2,1\n2,39\n")
    place = Path(scan_here(listed(config, str(source))).uri)
    (place / NEURONS_FILE).unlink()
    assert repaired(place) == 0
    assert "neurons.parquet: missing" in capsys.readouterr().out
    assert neg_service.open_run(place).listed_neurons() == NeuronSet.from_pairs(FEW)
    # Damaged, and the source has others by now.
    (place / NEURONS_FILE).write_bytes(b"damaged")
    source.write_text("layer,neuron\n0,5\n")
    with pytest.raises(DestinationError, match=r"belongs to another configuration: neurons\.count: 3 there, 1 asked"):
        repaired(place)
    # The command itself, with the neurons that it was begun with.
    source.write_text("neuron,layer\n5,0\n1,2\n39,2\n")
    begun(prepare(listed(config, str(source))))
    assert verify(open_store(str(place))).is_clean


def test_lost_neurons_without_a_source_are_told(config: ScanConfig) -> None:
    place = Path(scan_here(listed(config, FEW)).uri)
    (place / NEURONS_FILE).unlink()
    with pytest.raises(
        DestinationError, match=r"neurons\.parquet is missing: the command that began the run"
    ) as caught:
        repaired(place)
    assert "\n" not in str(caught.value)
    scan_here(listed(config, FEW))
    assert verify(open_store(str(place))).is_clean


def test_the_strongest_over_the_data_set_are_kept_and_ranked_again_when_they_are_lost(
    config: ScanConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = replace(config, neurons=NeuronsConfig(choose="top", count=7, over="dataset"))
    prepared, run = prepare(config), scan.run
    assert prepared.ranking is not None
    assert prepared.neurons is None
    monkeypatch.setattr(scan, "run", run_here)
    ranked = scan._with_strongest_listed(prepared, prepared.ranking)
    assert ranked.neurons is not None
    assert len(ranked.neurons) == 7
    part = next(Path(prepared.ranking.uri).glob("aggregate_importance/*.parquet"))
    whole = part.read_bytes()
    part.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    with refused(StorageError, says="its parts cannot be read"):
        strongest(prepared.ranking.uri, config)
    part.write_bytes(whole)
    run_here(ranked)
    place = Path(ranked.uri)
    parsed = json.loads((place / RUN_FILE).read_bytes())
    assert parsed["neurons"]["count"] == 7
    assert parsed["request"]["neurons"]["choose"] == "top"
    opened = neg_service.open_run(place)
    assert opened.listed_neurons() == ranked.neurons
    swept = opened.table("sweep").to_table().group_by(["layer", "neuron"]).aggregate([]).num_rows
    assert swept == 7
    # Nothing is ranked of a finished run, but for what is lost of it.
    caplog.clear()
    run(prepared)
    assert "ranking neurons" not in caplog.text
    (place / NEURONS_FILE).unlink()
    run(prepared)
    assert "ranking neurons" in caplog.text
    assert opened.listed_neurons() == ranked.neurons
