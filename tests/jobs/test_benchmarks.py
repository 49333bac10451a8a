"""The ways that benchmarks compare with must compute what they are compared for, or their ratios mean nothing."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from jobs.bench import bench
from jobs.benchmarks import ways
from jobs.benchmarks.sweep import LLAMA_3B, _bars, _multiplications
from neg_service.errors import ConfigurationError
from neg_service.measures.interventions import Interventions
from neg_service.measures.neg import sweep_prompt
from neg_service.measures.shifts import Sweep, coarse_grid, full_grid
from neg_service.models.batches import Budget
from neg_service.models.language_model import LanguageModel
from neg_service.neurons import NeuronSet
from neg_service.prompts.facts import load
from neg_service.prompts.tokens import encode
from tests import families_speed, oracle
from tests.refusals import refused
from tests.tiny_models import tiny_model

IDS, TARGET = (3, 14, 15, 9, 26), 7
SHIFTED = [(1, 5, -2.0), (1, 5, 0.3), (1, 5, 1.0)]


def test_the_other_ways_to_intervene_compute_the_same_probabilities() -> None:
    model = tiny_model("Llama 2", torch.float64).model
    expected = [oracle.probability_with_shift(model, IDS, TARGET, "paper", *shifted) for shifted in SHIFTED]
    for batch, logits in ((1, 0), (1, 1), (3, 1)):
        found = ways.textbook_interventions(model, IDS, TARGET, SHIFTED, batch, logits)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    expert = ways.Cached(model, IDS, len(SHIFTED))
    # Twice: its cache is as it was after a pass.
    for _ in range(2):
        np.testing.assert_allclose(expert.interventions(TARGET, SHIFTED), expected, rtol=1e-6)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0


def test_the_other_ways_to_gradients_compute_the_same() -> None:
    model = tiny_model("Llama 2", torch.float64).model
    prompts, targets = [IDS, IDS[:3]], [(7, 8), (1, 2)]
    expected = np.concatenate(
        [oracle.gradients(model, ids, own, "paper")[1] for ids, own in zip(prompts, targets, strict=True)]
    )
    for found in (ways.textbook(model, prompts, targets, 1), ways.expert(model, prompts, targets)):
        assert np.abs(torch.cat(found).numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.model
def test_the_coarse_grid_is_as_exact_as_is_said(smollm2: LanguageModel) -> None:
    prompts = load()[::160]
    draw = np.random.default_rng(1)
    neurons = NeuronSet.of_layers({layer: draw.choice(1536, 3, replace=False) for layer in range(0, 30, 5)})
    neg_error, r_error = [], []
    for prompt in encode(smollm2.tokenizer, prompts, None):
        interventions = Interventions(smollm2, prompt, "paper")
        full, coarse = (
            sweep_prompt(interventions, neurons, Sweep(grid), Budget(2**28), keep_curves=False).linearity_nk
            for grid in (full_grid(), coarse_grid())
        )
        neg_error.append(((coarse.neg - full.neg) / full.neg).abs().flatten())
        r_error.append((coarse.r - full.r).abs().flatten())
    neg, r = np.concatenate(neg_error), np.concatenate(r_error)
    assert np.median(neg) < 2e-4
    assert np.quantile(neg, 0.95) < 1e-2
    assert np.quantile(r, 0.95) < 2e-3


def test_what_an_installation_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "infra.s3.server", None)
    monkeypatch.delitem(sys.modules, "jobs.benchmarks.storage", raising=False)
    with refused(ConfigurationError, "benchmark", "storage", says=" is not installed"):
        bench(OmegaConf.create({"benchmark": {"name": "storage"}}))


def test_the_arithmetic_counts_llamas_parameters() -> None:
    # Half of 28 layers and one more, of 100.7 million weights each, and a head of 394 million.
    assert _multiplications(LLAMA_3B) == pytest.approx(14.5 * 100.66e6 + 394e6, rel=1e-3)


def test_a_longer_prompt_has_the_higher_bar() -> None:
    ratios = {name: {"median": 100.0} for name in ("textbook, one at a time, over engine", "expert, over engine")}
    assert [one["reached"] for one in _bars(30, ratios)] == [True, True]
    assert [one["reached"] for one in _bars(300, ratios)] == [False, True]


def test_a_family_that_falls_off_the_fast_path_misses_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = families_speed.Settings(repeats=1, prompts=4, tokens=16, targets=2, interventions=8)
    few = {name: families_speed.FAMILIES[name] for name in ("Llama 2", "GPT-J", "BERT")}
    monkeypatch.setattr(families_speed, "FAMILIES", few)
    found = families_speed.run(settings)
    assert [one["engine"] for one in found["families"].values()] == ["differences", "kv_cache", "full_sequence"]
    assert found["bars"][0] == {
        "name": "families that fell off their engine: none", "value": 0, "bar": "<= 0", "reached": True,
    }  # fmt: skip
    monkeypatch.setattr("neg_service.models.engines.shared_prefix.run_prefix", None)
    fell = families_speed.run(settings)["bars"][0]
    assert (fell["name"], fell["reached"]) == ("families that fell off their engine: Llama 2", False)
