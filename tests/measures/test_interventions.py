"""Interventions on single neurons: which layers run for them, in which batches; effects of any size are right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

import neg_service
from neg_service.config import NeuronsConfig
from neg_service.errors import OutOfMemory
from neg_service.measures import interventions
from neg_service.models.batches import Budget
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import Prompt
from tests import oracle
from tests.refusals import refused
from tests.shards import measured_shard
from tests.sweeps import SHIFTS, sweep_of, swept
from tests.tiny_models import tiny_model, tiny_tokenizer


def test_pressure_on_memory_never_stops_a_run_as_if_it_were_a_setting() -> None:
    model = tiny_model("BERT", torch.float64)
    prompts = [Prompt("a", "w1 " * 50 + "w96", ("w2",)), Prompt("b", "w1 w96", ("w2",))]
    neurons, measure = NeuronsConfig(choose="sample", count=1), sweep_of(shifts=SHIFTS)
    noise = {"noise": {"sigma": 0.0}}
    easy = measured_shard(measure, model, prompts, neurons, noise)["sweep"]
    hard = measured_shard(measure, model, prompts, neurons, noise, Budget(1))["sweep"]
    np.testing.assert_allclose(hard["neg"], easy["neg"], rtol=1e-6)


def test_rows_share_what_prompts_begin_with_and_targets_share_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama 2", torch.float64, engine="shared_prefix")
    model.ensure_checked()
    header = " ".join(f"w{i}" for i in range(1, 31))
    # Three prompts with a common beginning that is worth a pass of its own.
    prompts = [
        Prompt(str(i), f"{header} {header} w{i} w{i + 10} w{i + 20}", (" w7", " w8", " w9")) for i in range(2, 5)
    ]
    monkeypatch.setattr("neg_service.models.batches.PASS_COST", 4)
    passes: list[int] = []
    tokens: list[int] = []
    layer = model.feed_forward.layers[1]
    layer.register_forward_hook(lambda _m, i, out: passes.append(1))
    layer.register_forward_pre_hook(lambda _m, i: tokens.append(i[0].shape[1]))
    table = swept(model, NeuronsConfig(choose="list", list=[[1, 3]]), prompts)["sweep"]
    # The header once; then for each prompt the rest of its prefix, the last token, rows for gradients, and one batch.
    assert max(tokens) == 60
    assert sum(count >= 60 for count in tokens) == 1
    assert len(passes) == 1 + 3 * 4
    model.forget_prefixes()
    for i, prompt in enumerate(prompts):
        alone = neg_service.neg(model, prompt.text, " w8", [(1, 3)], SHIFTS)
        np.testing.assert_allclose(table["neg"].to_numpy()[3 * i + 1], alone.neg[0], rtol=1e-6)


def test_every_batch_has_an_baseline_row_and_layers_below_do_not_run() -> None:
    model = tiny_model("Llama 2", engine="shared_prefix")
    # Measures the noise, too.
    neg_service.neg(model, "w3 w14 w15", " w7", [(1, 2)], [1.0])
    model.forget_prefixes()
    ran: list[tuple[int, int]] = []
    for index, layer in enumerate(model.feed_forward.layers):
        layer.register_forward_pre_hook(lambda _m, i, index=index: ran.append((index, i[0].shape[1])))
    heads: list[torch.Tensor] = []
    model.model.lm_head.register_forward_hook(lambda _m, i, _o: heads.append(i[0][0]))
    neg_service.neg(model, "w3 w14 w15", " w7", [(1, 2), (1, 3)], [1.0, 2.0], batch_bytes=2 * 4 * model.row_values)
    # The prefix of two tokens, the last token; then a pass an intervention, whose rows begin in layer 1 as one.
    assert ran == [(0, 2), (1, 2), (2, 2), (0, 1), (1, 1), (2, 1), *[(1, 1), (2, 2)] * 4]
    # The head is given the baseline row, the same each time, and differences from it, all different.
    plain, *batches = heads
    for batch in batches:
        torch.testing.assert_close(batch[0], plain[0])
        assert batch[1].abs().max() < 0.5 * batch[0].abs().max()
    assert len({tuple(batch[1].tolist()) for batch in batches}) == 4


@pytest.mark.parametrize("family", ["Llama 2", "Gemma 2", "BERT"])
def test_effects_beyond_the_range_of_exponentials_are_right(family: str) -> None:
    model = tiny_model(family)
    model.model.get_output_embeddings().weight.mul_(30)
    text = "w3 w14 w15 w96" if model.is_masked else "w3 w14 w15"
    ids = [int(word[1:]) for word in text.split()]
    shifts = [-30.0, 30.0]
    for target in (7, 8, 9, 50):
        found = neg_service.neg(model, text, f" w{target}", [(2, 3), (1, 4)], shifts, shift="signed")
        for i, (layer, n) in enumerate(found.neurons.tolist()):
            before, *after = (
                oracle.probability_with_shift(model.model, ids, target, "paper", layer, n, s) for s in (0.0, *shifts)
            )
            np.testing.assert_allclose(found.delta_p[i], np.array(after) - before, atol=2e-3)
        assert np.isfinite(found.r).all()


def test_when_memory_ends_batches_shrink_and_rows_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # Prompts that run together: `test_together.py`.
    monkeypatch.setattr("neg_service.measures.sweep.run_together", lambda *_: False)
    model = tiny_model("Llama 2", torch.float64)
    whole = swept(model, NeuronsConfig(choose="sample", count=4))["sweep"]
    real, sizes = interventions.Interventions._run, []

    def small_memory(self: Any, moved: Any) -> Any:
        sizes.append(sum(len(own.shifts_i) for own in moved))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, moved)

    monkeypatch.setattr(interventions.Interventions, "_run", small_memory)
    shrunk = swept(model, NeuronsConfig(choose="sample", count=4))["sweep"]
    np.testing.assert_allclose(shrunk["neg"], whole["neg"], rtol=1e-6)
    # Halved at the first prompt, and remembered for the next ones; tried again after 16 batches that fitted, then 32.
    assert [size for size in sizes if size > 3] == [48, 24, 12, 6, 6]

    monkeypatch.setattr(interventions.Interventions, "_run", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
    with refused(OutOfMemory, setting=None, says="prompt '.' .* one intervention does not fit"):
        swept(model, NeuronsConfig(choose="sample", count=4))


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_a_constant_factor_after_the_head_passes_through(factor: float) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
    config = GraniteConfig(**sizes, num_key_value_heads=2, num_hidden_layers=3, logits_scaling=1 / factor)
    own = GraniteForCausalLM(config).double()
    model = LanguageModel(own, tiny_tokenizer())
    found = neg_service.neg(model, "w3 w14 w15", " w7", [(0, 3)], [1.5], shift="signed")
    before, after = (oracle.probability_with_shift(own, (3, 14, 15), 7, "paper", 0, 3, shift) for shift in (0.0, 1.5))
    assert found.delta_p[0, 0] == pytest.approx(after - before, rel=1e-5)
