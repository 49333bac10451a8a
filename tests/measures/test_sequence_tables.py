"""What scans store of targets of several tokens, and which measures and models refuse them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import neg_service
from neg_service.cluster.prepare import prepare
from neg_service.cluster.ranking import ranking_of, strongest
from neg_service.config import DatasetConfig, ModelConfig, NeuronsConfig, ScanConfig, StorageConfig
from neg_service.errors import ConfigurationError
from neg_service.measures import measure_of
from neg_service.measures.noise import row_noise
from neg_service.models.language_model import LanguageModel
from neg_service.models.precision import in_precision
from neg_service.prompts.prompt import Prompt
from tests import sequences
from tests.families import model_of
from tests.here import scan_here
from tests.refusals import refused
from tests.shards import INFO, measured_shard
from tests.tiny_models import tiny_model

# The second has single tokens only; the third's last target is all that another begins with.
PROMPTS = [
    Prompt("a", "w3 w14 w15 w9 w26 w5", (" w7 w8", " w8", " w11 w12 w13"), 1),
    Prompt("b", "w3 w14 w15 w9 w2", (" w7", " w8"), 0),
    Prompt("c", "w50", (" w1 w2 w3", " w1 w2"), 1),
]
NOISE = {"noise": {"sigma": 0.0}}


def scanned(model: LanguageModel, neurons: NeuronsConfig | None = None, **options: Any) -> dict[str, pa.Table]:
    return measured_shard(measure_of(options), model, PROMPTS, neurons, NOISE, sequences=True)


def by_hand(model: LanguageModel, prompt: Prompt) -> list[np.ndarray]:
    """Of each target, its tokens' log p."""
    ids = [int(word[1:]) for word in prompt.text.split()]
    targets = [[int(word[1:]) for word in target.split()] for target in prompt.targets]
    with torch.no_grad():
        return [sequences.log_p(model.model, ids, target).numpy() for target in targets]


@pytest.mark.parametrize("keep", ["all", "answer"])
def test_a_row_of_prompts_has_all_tokens_and_what_is_likeliest_by_token(keep: str) -> None:
    model = model_of("Llama 2")
    found = scanned(model, name="neurgrad", keep=keep)
    for prompt, row in zip(PROMPTS, found["prompts"].to_pylist(), strict=True):
        log_p = by_hand(model, prompt)
        np.testing.assert_allclose(row["probabilities"], [np.exp(own.sum()) for own in log_p], rtol=1e-4)
        assert row["prediction"] == int(np.argmax([own.sum() for own in log_p]))
        if prompt.id == "b":
            assert row["target_sequences"] is row["token_probabilities"] is None
            assert row["prediction_per_token"] == row["prediction"]
            continue
        assert row["target_sequences"] == [[int(w[1:]) for w in target.split()] for target in prompt.targets]
        assert row["target_tokens"] == [own[0] for own in row["target_sequences"]]
        for stored, own in zip(row["token_probabilities"], log_p, strict=True):
            np.testing.assert_allclose(stored, np.exp(own), rtol=1e-4)
        assert row["prediction_per_token"] == int(np.argmax([own.mean() for own in log_p]))
    kept = [prompt.answer if keep == "answer" else None for prompt in PROMPTS]
    n_rows = sum(1 if own is not None else len(prompt.targets) for own, prompt in zip(kept, PROMPTS, strict=True))
    assert found["neurgrad"].num_rows == n_rows * model.feed_forward.n_layers


def test_a_longer_target_may_be_the_likelier_one_by_token() -> None:
    rows = scanned(model_of("Llama 2"), name="neurgrad")["prompts"].to_pylist()
    assert any(row["prediction_per_token"] != row["prediction"] for row in rows)


def test_sweeps_and_edits_store_what_plain_passes_give() -> None:
    model = tiny_model("Llama 2", torch.float64)
    neurons = NeuronsConfig(choose="list", list=[[2, 39], [0, 5]])
    swept = scanned(model, neurons, name="sweep", shifts=[-0.5, 0.5], keep_curves=True)
    edited = scanned(
        model, name="intervene", edits=[{"name": "up", "neurons": [[2, 39]], "shift": 0.5, "signed": True}]
    )
    edits = {(row["prompt_id"], row["target_index"]): row for row in edited["intervene"].to_pylist()}
    checked = 0
    for row in swept["sweep"].to_pylist():
        (prompt,) = [own for own in PROMPTS if own.id == row["prompt_id"]]
        ids = [int(word[1:]) for word in prompt.text.split()]
        target = [int(word[1:]) for word in row["target"].split()]

        def p(shift: float, ids: list[int] = ids, target: list[int] = target, row: dict[str, Any] = row) -> float:
            return sequences.shifted(model.model, ids, target, "paper", [(row["layer"], row["neuron"])], shift)

        sign = -1 if row["activation"] < 0 else 1
        expected = [p(sign * shift) - p(0.0) for shift in (-0.5, 0.5)]
        np.testing.assert_allclose(row["delta_p"], expected, rtol=1e-4, atol=1e-9 * p(0.0))
        assert row["neg"] == pytest.approx(expected[1] - expected[0], rel=1e-4, abs=1e-9 * p(0.0))
        if row["layer"] == 2:
            edit = edits[row["prompt_id"], row["target_index"]]
            assert edit["delta_p"] == pytest.approx(p(0.5) - p(0.0), rel=1e-4, abs=1e-9 * p(0.0))
        checked += 1
    assert checked == 14


def test_errors_in_float32_are_within_what_is_stated() -> None:
    model, prompt, target = tiny_model("GPT-2"), "w3 w14 w15 w9 w26 w5", " w7 w8 w9"
    neurons = [(layer, neuron) for layer in range(3) for neuron in range(40)]
    asked: dict[str, Any] = {"shifts": [-1.0, 0.1, 1.0], "not_one_token": "sequence"}
    found = neg_service.neg(model, prompt, target, neurons, **asked)
    with in_precision(model.model, model.feed_forward.layers, torch.float64):
        model.forget_prefixes()
        exact = neg_service.neg(model, prompt, target, neurons, **asked)
    assert not row_noise(model, "paper", sequences=True).is_per_row
    assert row_noise(model, "paper", sequences=True).sigma > 0
    off = np.abs(found.neg - exact.neg)
    assert off.max() > 0
    assert (off <= found.error).mean() > 0.95


def test_a_ranking_of_what_float32_loses_is_refused_and_told_of(
    tiny_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = "".join(f" w{i}" for i in range(3, 40))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "w1 w2", "targets": [long, f"{long} w5"], "id": "long"}))
    config = ScanConfig(
        model=ModelConfig(source=str(tiny_directory)),
        dataset=DatasetConfig(source=str(tmp_path / "rows.jsonl"), not_one_token="sequence"),
        storage=StorageConfig(uri=str(tmp_path / "results")),
        measure={"name": "sweep"},
        neurons=NeuronsConfig(choose="top", count=3, over="dataset"),
    )
    with refused(ConfigurationError, "neurons.over", "dataset", says="use measure.readout=log_probability"):
        strongest(scan_here(ranking_of(config)).uri, config)
    assert "prompt 'long' has a target whose probability is below what float32 holds" in caplog.text
    kept = replace(config, measure={"name": "sweep", "readout": "log_probability"})
    assert len(strongest(scan_here(ranking_of(kept)).uri, kept).list or ()) == 3
    caplog.clear()
    model = neg_service.load_model(tiny_directory)
    found = neg_service.neurgrad(model, ["w1 w2"], [[long]], not_one_token="sequence")
    assert not found.neurgrad.any()
    assert "prompt 'prompts[0]' has a target" in caplog.text
    assert "lost: readout=log_probability keeps them" in caplog.text


def test_measures_and_models_without_use_for_them_refuse_them_by_name() -> None:
    for name in ("skill_scores", "control"):
        with refused(ConfigurationError, setting="dataset.not_one_token", value="sequence", says=f"measure={name}"):
            measure_of({"name": name}).check_targets(INFO, "sequence")
    measure_of({"name": "skill_scores"}).check_targets(INFO, "skip")
    for name in ("neurgrad", "gradient", "integrated_gradients", "aggregate_importance", "sweep", "positions"):
        measure_of({"name": name}).check_targets(INFO, "sequence")
        with refused(ConfigurationError, setting="dataset.not_one_token", says="masked model"):
            measure_of({"name": name}).check_targets(replace(INFO, is_masked=True), "sequence")


def test_a_scan_leaves_nothing_out_but_what_it_is_told_to(tiny_directory: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "w1 w2", "targets": [" w3 w4", " w5"], "answer": " w3 w4", "id": "a"},
        {"prompt": "w1 " * 40 + "w2", "targets": [" w3 w4", " w5"], "answer": " w5", "id": "long"},
        {"prompt": "w7", "targets": [" w8", " w9"], "answer": " w9", "id": "b"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ScanConfig(
        model=ModelConfig(source=str(tiny_directory)),
        dataset=DatasetConfig(source=str(tmp_path / "rows.jsonl"), not_one_token="sequence", too_long="skip"),
        storage=StorageConfig(uri=str(tmp_path / "results")),
        measure={"name": "neurgrad", "keep": "answer", "at": "each"},
    )
    found = scan_here(config).table("prompts").to_table().to_pylist()
    kept = {row["prompt_id"]: row for row in found}
    assert {"a", "b"} <= set(kept)
    assert kept["a"]["target_sequences"] == [[3, 4], [5]]
    assert kept["a"]["probabilities"][0] == pytest.approx(np.prod(kept["a"]["token_probabilities"][0]), rel=1e-5)
    assert kept["b"]["target_sequences"] is None
    with refused(ConfigurationError, setting="dataset.not_one_token", says="measure=skill_scores"):
        prepare(replace(config, measure={"name": "skill_scores"}))
