"""The ways that benchmarks compare with must compute what they are compared for, or their ratios mean nothing."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import neg_service
from jobs.bench import bench
from jobs.benchmarks import control, neurgrad, ways
from jobs.benchmarks.figures import FAST, OFF
from jobs.benchmarks.sweep import LLAMA_3B, _bars, _errors, _multiplications, _ratios
from neg_service.errors import ConfigurationError
from neg_service.measures.shifts import adaptive_grid, coarse_grid, full_grid
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


@pytest.mark.faults
@pytest.mark.model
def test_the_grids_of_fewer_shifts_are_as_exact_as_is_said(smollm2: LanguageModel) -> None:
    facts = load()
    prompts = list(encode(smollm2.tokenizer, [facts[0], facts[-1]], None))
    draw = np.random.default_rng(1)
    neurons = NeuronSet.of_layers({layer: draw.choice(1536, 5, replace=False) for layer in (12, 18, 24, 29)})
    told = _errors(
        smollm2, prompts, neurons, {"adaptive": adaptive_grid(), "coarse": coarse_grid(), "full": full_grid()}
    )
    adaptive, coarse, full = (told["errors"][name] for name in ("adaptive", "coarse", "full"))
    assert adaptive["shifts a neuron"] <= 3.5
    assert adaptive["error over stated error"]["98 %"] <= 1
    assert full["error over stated error"]["98 %"] <= 1
    assert adaptive["relative error of NEG"]["median"] < 2e-4
    assert adaptive["error of r"]["98 %"] < 3e-3
    assert coarse["relative error of NEG"]["median"] < 3e-4
    assert coarse["error of r"]["90 %"] < 2e-3


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


@pytest.mark.faults
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


def test_prompts_of_any_number() -> None:
    shape = {"header_tokens": 3, "least_own_tokens": 40, "most_own_tokens": 110, "targets": 2}
    for count in (1, 2, 9, 16):
        settings = neurgrad.Settings("", "", 1, 1, prompts=count, **shape)
        prompts, targets = neurgrad.data_of(settings, 500)
        assert len(prompts) == len(targets) == count
        lengths = [len(ids) - 3 for ids in prompts]
        # Every two have the same mean, so that ways that run few of them compare with those that run all.
        assert all(a + b == 150 for a, b in zip(lengths[::2], lengths[1::2], strict=False))
        assert all(0 < few <= count for few in neurgrad._counts(settings).values())


def test_with_onednn_the_engine_without_it_is_compared_too() -> None:
    layers = (0, 1)
    of_layer = {"engine": 1.0, f"engine{OFF}": 2.0, "floor": 1.5, f"floor{FAST}": 0.8}
    seconds = {
        f"{name.split(',')[0]}, layer {i}{name[len(name.split(',')[0]) :]}": [own]
        for name, own in of_layer.items()
        for i in layers
    }
    others = {"textbook, one at a time": [100.0], "expert": [3.0], f"expert{FAST}": [2.0]}
    found = _ratios(seconds | others, [1.0], layers)
    assert found[f"engine{OFF}, over engine"]["median"] == 2
    assert found[f"expert{FAST}, over engine"]["median"] == 2
    assert found["engine over floor, layer 1"]["median"] == 0.6667
    assert found[f"engine over floor{FAST}, layer 1"]["median"] == 1.25
    bars = {one["name"]: one for one in _bars(30, found)}
    assert sorted(bars) == sorted(
        [f"engine over floor, layer {i}, 30 tokens" for i in layers]
        + ["textbook, one at a time, over engine, 30 tokens", "expert, over engine, 30 tokens"]
        + [f"engine{OFF}, over engine, 30 tokens"]
    )
    plain = {name: own for name, own in (seconds | others).items() if FAST not in name and OFF not in name}
    assert not any("oneDNN" in name or OFF in name for name in _ratios(plain, [1.0], layers))


@pytest.mark.parametrize("product", ["torch", "onednn"])
def test_what_the_gradients_benchmark_makes_of_its_turns(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of eight run in two of three repeats, and are the faster textbook way in the first."""
    seconds = {neurgrad.ONE: [40.0, 30.0, 30.0], neurgrad.EIGHT: [20.0, 60.0], f"engine{OFF}": [2.0, 2.0, 2.0]}

    def turns(prepared: dict[str, object], repeats: int, seldom: list[str]) -> tuple[dict[str, list[float]], ...]:
        assert (repeats, seldom) == (3, [neurgrad.EIGHT])
        n_turns = {name: 2 if name in seldom else 3 for name in prepared}
        found = {name: seconds.get(name, [1.0] * n) for name, n in n_turns.items()}
        return found, {name: [100.0 if name == neurgrad.EIGHT else 10.0] * n for name, n in n_turns.items()}

    monkeypatch.setattr(neurgrad, "taking_turns", turns)
    monkeypatch.setattr(neurgrad, "chosen_product", lambda *_: {"name": product})
    found = neurgrad.run(neurgrad.Settings("", "", 1, 3, 3, 40, 110, 2, 9))
    textbook = found["ratios"]["textbook over engine"]
    assert (textbook["min"], textbook["median"], textbook["max"]) == (20, 30, 30)
    assert found["ratios"]["memory, engine over textbook in batches of 8"]["median"] == 0.1
    gain = {one["name"]: one for one in found["bars"]}.get(f"engine{OFF}, over engine")
    assert (gain is not None) is (product == "onednn")
    assert (f"expert{FAST}" in found["seconds_a_prompt"]) is (product == "onednn")
    assert gain is None or (gain["value"], gain["reached"]) == (2, True)


def test_wishes_are_drawn_of_right_and_wrong_targets_in_equal_numbers() -> None:
    wishes = control.drawn(200, seed=3)
    assert wishes == control.drawn(200, seed=3)
    assert wishes != control.drawn(200, seed=4)
    right = {prompt.text: prompt.targets[prompt.answer] for prompt in load() if prompt.answer is not None}
    assert [own.target == right[own.prompt] for own in wishes] == [own.is_right for own in wishes]
    assert sum(own.is_right for own in wishes) == 100
    wanted = sorted(own.wanted for own in wishes)
    assert 0.1 <= wanted[0] < 0.12
    assert 0.88 < wanted[-1] <= 0.9


def test_what_will_not_be_reached_is_foretold_by_its_size() -> None:
    size, is_reached = np.array([0.1, 0.2, 0.3, 0.4]), np.array([True, True, False, True])
    # Said of the last two, and right of one of them; of three that were reached two are smaller.
    assert control.foretold(size, is_reached, beyond=0.25) == {
        "beyond": 0.25, "not reached": 1, "said not to be": 2, "right": 0.75, "precision": 0.5, "recall": 1.0,
        "auc": 0.6667,
    }  # fmt: skip
    nothing = control.foretold(size, np.ones(4, bool), beyond=1)
    assert (nothing["right"], nothing["precision"], nothing["recall"], nothing["auc"]) == (1.0, None, None, None)


@pytest.mark.faults
@pytest.mark.model
def test_the_benchmark_of_control_foretells_from_the_step_that_control_tries(
    smollm2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "load_model", lambda source, device: smollm2)
    monkeypatch.setattr(control, "set_threads", lambda n: None)
    settings = control.Settings(
        "control", "smollm2", 1, pairs=4, seed=0, neurons=16, tolerance=0.01, beyond_nats=12, beyond_norms=0.05
    )
    found = control.run(settings)
    assert next((one["value"], one["reached"]) for one in found["bars"]) == (1.0, True)
    assert found["all neurons"]["within 0.02"] == 1
    assert found["16 neurons"]["norm over that of activations"]["unit"] == "ratio"
    wishes = control.drawn(4, 0)
    tried = neg_service.control(
        smollm2, [own.prompt for own in wishes], [own.target for own in wishes], neurons=16, max_passes=1,
        probability=[own.wanted for own in wishes],
    )  # fmt: skip
    is_given = tried.norm > 0
    assert is_given.any()
    distance, first = control.before_any_shift(smollm2, wishes, 16)
    np.testing.assert_allclose(first[is_given], tried.relative_norm[is_given], rtol=1e-3)
    odds = [own.wanted / (1 - own.wanted) for own in wishes] / (
        tried.probability_before / (1 - tried.probability_before)
    )
    np.testing.assert_allclose(distance, np.abs(np.log(odds)), rtol=1e-4)
    with refused(ConfigurationError, "benchmark.pairs", "1", says="at least 2"):
        control.run(replace(settings, pairs=1))
