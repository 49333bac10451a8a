"""How often the CPU waits for an accelerator: once a batch, whatever is measured, so that the device has work.

Counted on a pretended device (`tests/devices.py`), in whose place a GPU would stand still each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import neg_service
from neg_service import LanguageModel
from neg_service.config import NeuronsConfig
from neg_service.measures import gradients, measure_of
from neg_service.measures.interventions import Interventions
from neg_service.models.batches import Budget
from neg_service.prompts.prompt import Prompt
from neg_service.prompts.tokens import encode
from tests.devices import counted_waits, pretended
from tests.mixtures import tiny_mixture
from tests.shards import measured_shard
from tests.tiny_models import tiny_model

N_LAYERS = 3
TEXTS = ["w3 w14 w9 w26 w35 w8", "w3 w14 w9 w2", "w50 w3"]
PROMPTS = [Prompt(str(i), text, (" w7", " w8"), 0) for i, text in enumerate(TEXTS)]


@contextmanager
def elsewhere(name: str, dtype: torch.dtype = torch.float32) -> Iterator[LanguageModel]:
    plain = tiny_mixture(name, dtype) if name == "OLMoE" else tiny_model(name, dtype)
    selection = plain.ensure_checked()
    with pretended():
        model = LanguageModel(plain.model.to("meta:0"), plain.tokenizer, name=name)
        model.adopt(selection)
        yield model


@pytest.mark.parametrize(
    ("family", "a_batch"),
    [
        ("Llama 2", 1),
        # Each layer's products of experts need their numbers, in the pass over the prefixes and in the rows'; and which
        # experts ran is fetched before what their neurons gave.
        ("OLMoE", 2 + 2 * N_LAYERS),
    ],
)
def test_gradients_wait_once_a_batch(family: str, a_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    real = gradients.target_gradients
    monkeypatch.setattr(gradients, "target_gradients", lambda *given, **more: batches.append(1) or real(*given, **more))
    some = NeuronsConfig(choose="list", list=[[0, 3], [2, 1]] if family == "Llama 2" else [[0, 3, 1], [2, 1, 0]])
    asked = [
        ({"name": "neurgrad"}, None),
        ({"name": "neurgrad", "keep": "top_k", "top_k": 5}, None),
        ({"name": "skill_scores"}, None),
        ({"name": "aggregate_importance"}, None),
        ({"name": "neuron_predictions"}, some),
    ]
    with elsewhere(family) as model:
        for options, neurons in asked if family == "Llama 2" else (asked[0], asked[-1]):
            # All together, and at last each prompt alone.
            budget = Budget(1 if neurons else 2**28)
            batches.clear()
            with counted_waits() as waits:
                measured_shard(measure_of(options), model, PROMPTS, neurons, budget=budget)
            assert len(batches) == len(PROMPTS) if neurons else len(batches) < len(PROMPTS)
            assert 0 < len(waits) <= a_batch * len(batches), (options, waits)


def test_a_sweep_waits_no_more_often_for_being_run_in_many_batches() -> None:
    neurons = NeuronsConfig(choose="sample", count=4)
    measure, plain = measure_of({"name": "sweep", "shifts": [-1.0, 1.0]}), tiny_model("Llama 2")
    calibration = measure.calibrate(plain, list(encode(plain.tokenizer, PROMPTS[:1], None)), neurons)
    with elsewhere("Llama 2") as model:
        found = []
        for budget in (Budget(2**28), Budget(3 * model.engine.row_sizes(1).run)):
            with counted_waits() as waits:
                table = measured_shard(measure, model, PROMPTS[:1], neurons, calibration, budget)["sweep"]
            found.append((len(waits), table))
    (waits, whole), (waits_in_batches, in_batches) = found
    assert waits_in_batches == waits
    assert waits <= 22
    np.testing.assert_allclose(in_batches["neg"], whole["neg"], rtol=1e-3, atol=1e-9)


# One whose logits are scaled after the head.
@pytest.mark.parametrize("family", ["Llama 2", "Cohere"])
def test_prompts_that_are_swept_together_wait_together(family: str) -> None:
    neurons = NeuronsConfig(choose="sample", count=4)
    measure, plain = measure_of({"name": "sweep"}), tiny_model(family)
    calibration = measure.calibrate(plain, list(encode(plain.tokenizer, PROMPTS[:1], None)), neurons)
    with elsewhere(family) as model:
        found = []
        for n in (1, len(PROMPTS)):
            with counted_waits() as waits:
                measured_shard(measure, model, PROMPTS[:n], neurons, calibration)
            found.append(len(waits))
    # A stage of the adaptive grid asks of each prompt which neurons are done.
    alone, together = found
    assert alone <= 45
    assert together < len(PROMPTS) * alone


@pytest.mark.faults
def test_effects_beyond_the_range_of_exponentials_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, shifts = [(2, 3), (1, 4)], [-30.0, 30.0]
    runs: list[int] = []
    real = Interventions._run
    monkeypatch.setattr(
        Interventions,
        "_run",
        lambda self, *given: runs.append(sum(len(own.shifts_i) for own in given[0])) or real(self, *given),
    )

    def measured(model: LanguageModel) -> neg_service.NegResult:
        model.ensure_checked()
        with torch.no_grad():
            # A head whose logits move by more than 88.
            model.model.lm_head.weight *= 30
        runs.clear()
        return neg_service.neg(model, TEXTS[0], " w7", pairs, shifts)

    expected = measured(tiny_model("Llama 2"))
    n_runs = list(runs)
    with elsewhere("Llama 2") as model:
        found = measured(model)
    assert np.isfinite(found.delta_p).all()
    np.testing.assert_allclose(found.delta_p, expected.delta_p, rtol=1e-10)
    # A layer's batch runs twice where it has such a row.
    assert len(n_runs) < len(runs) <= 2 * len(n_runs)


def test_what_waits_is_counted() -> None:
    with pretended():
        x = torch.arange(3.0).to("meta:0")
        with counted_waits() as waits:
            x.sum().cpu()
            x[torch.tensor([0, 1])]
            x[x > 1]
            torch.ones(3).to("meta:0")
            assert len(waits) == 4
            (x + 1).sum()
            torch.ones(3).to("meta:0", non_blocking=True)
            torch.empty(3).copy_(x, non_blocking=True)
            assert len(waits) == 4
            assert bool(x.sum() > 1)
        assert len(waits) == 5
