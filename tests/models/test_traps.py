"""Wrong on purpose: each known trap is sprung, and the comparisons of `tests/families.py` see it.

Without these a comparison that sees nothing would pass as well. What the same comparisons give for the engine as it is:
`test_families.py`. Traps that end in a refusal (labels of several tokens, prompts with no or several masks, recurrent
layers) are tested where the refusal is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor

import neg_service
from neg_service import LanguageModel
from neg_service.errors import ModelError
from neg_service.measures.changes import Changes, Moved, joined
from neg_service.measures.gradients import gradients
from neg_service.measures.interventions import Interventions
from neg_service.measures.readout import Readout
from neg_service.models.batches import Budget, group_by_prefix
from neg_service.models.engines import prefix_attention, shared_prefix
from neg_service.models.engines.differences import DifferencesEngine
from neg_service.models.engines.frozen_cache import _FrozenAttention
from neg_service.models.engines.full_sequence import FullSequenceRows
from neg_service.models.feed_forward import Mlp, Site
from neg_service.models.hook_points import HookPoint
from neg_service.models.start_at_layer import start_at_layer
from neg_service.prompts.prompt import Prompt
from neg_service.prompts.tokens import encode
from tests.families import LENGTHS, bases_of, model_of, neurgrad_deviation, sweep_deviation
from tests.refusals import refused
from tests.tiny_models import FAMILIES, tiny_model, tiny_tokenizer

# A sprung trap moves results by this at least; right ones agree to 2e-5.
SEEN = 1e-3

WINDOWED = [
    name
    for name, family in FAMILIES.items()
    if family.engine is DifferencesEngine and getattr(family.config().get_text_config(), "sliding_window", None)
]
ABSOLUTE_OR_ROTARY = ["GPT-2", "OPT", "Llama 2", "GPT-NeoX (Pythia)"]
FUSED = ["Phi-3 and 4", "Phi-4-mini", "GLM", "GLM-4", "ModernBERT"]
NORM_AFTER_MLP = ["Gemma 2", "Gemma 3", "OLMo 2", "OLMo 3", "GLM-4", "EXAONE 4"]
MASKED = [name for name in FAMILIES if FAMILIES[name].is_masked]


# Of each engine, with plain, gated and fused projections.
OF_EACH_KIND = ["Llama 2", "Phi-3 and 4", "GLM-4", "GPT-2", "GPT-J", "BERT", "ModernBERT"]


@pytest.fixture(autouse=True)
def _checked_before(request: pytest.FixtureRequest) -> None:
    """The self-check would see most traps itself; here it has passed before they are sprung."""
    of_test = request.node.callspec.params["family"] if hasattr(request.node, "callspec") else "Gemma 2"
    for family in {"Llama 2", of_test}:
        model_of(family).ensure_checked()


@pytest.mark.parametrize("family", ABSOLUTE_OR_ROTARY)
def test_positions_shifted_by_padding(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shared_prefix.packed

    def padded(model: Any, ids: Any, positions: Any) -> dict[str, Any]:
        longest = max(place for row in positions for place in row)
        return real(model, ids, [[longest] * len(row) if len(set(row)) == 1 else row for row in positions])

    monkeypatch.setattr(shared_prefix, "packed", padded)
    assert neurgrad_deviation(family, "paper", LENGTHS) > SEEN


@pytest.mark.parametrize("family", ["Llama 2", "GPT-2", "Gemma 2"])
def test_padding_that_is_attended_to(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_attention.RowPass, "hidden_keys", lambda self, window, device: (None, None))
    assert neurgrad_deviation(family, "paper", LENGTHS) > SEEN


@pytest.mark.parametrize("family", MASKED)
def test_padding_that_is_attended_to_in_whole_sequences(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FullSequenceRows.__init__

    def blind(self: Any, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        self._visible_bt = torch.ones_like(self._visible_bt)

    monkeypatch.setattr(FullSequenceRows, "__init__", blind)
    assert neurgrad_deviation(family, "paper", LENGTHS) > SEEN


@pytest.mark.parametrize("family", ["GPT-J", "Falcon", "BLOOM"])
def test_a_cache_that_changes_in_place(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = _FrozenAttention.update

    def in_place(self: Any, keys: Any, values: Any, *args: Any, **options: Any) -> Any:
        found = real(self, keys, values, *args, **options)
        self.keys, self.values = (x[:1] for x in found)
        return found

    monkeypatch.setattr(_FrozenAttention, "update", in_place)
    # The layers' caches no longer agree on how many tokens there are.
    with pytest.raises(RuntimeError, match="size of"):
        sweep_deviation(family, "paper")


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_that_is_ignored(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _change_the_view(monkeypatch, lambda view: dataclasses.replace(view, window=None))
    assert neurgrad_deviation(family, "paper", LENGTHS) > SEEN
    assert sweep_deviation(family, "paper") > SEEN


@pytest.mark.parametrize("family", ["Gemma 3", "Gemma 3, images and text"])
def test_local_layers_with_the_global_layers_angles(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (rotary,) = [part for part in model_of(family).model.modules() if "RotaryEmbedding" in type(part).__name__]
    real = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda x, position_ids, _layer_type: real(x, position_ids, "full_attention"))
    assert neurgrad_deviation(family, "paper", LENGTHS) > SEEN


@pytest.mark.parametrize("family", ["Granite", "Gemma 2"])
def test_attention_that_is_scaled_as_everybody_elses(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _change_the_view(monkeypatch, lambda view: dataclasses.replace(view, scaling=view.scaling * 1.1))
    assert neurgrad_deviation(family, "paper", LENGTHS) > SEEN


def test_attention_without_its_soft_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    _change_the_view(monkeypatch, lambda view: dataclasses.replace(view, softcap=None))
    assert neurgrad_deviation("Gemma 2", "paper", LENGTHS) > SEEN


def test_logits_without_their_soft_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Readout.__init__

    def capless(self: Any, model: LanguageModel) -> None:
        real(self, model)
        self._cap = None

    monkeypatch.setattr(Readout, "__init__", capless)
    with refused(ModelError, says="neither a factor nor a soft cap"):
        sweep_deviation("Gemma 2", "paper")


@pytest.mark.parametrize("family", ["Granite", "Cohere", "Cohere 2"])
def test_logits_without_their_factor(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Readout.baseline
    monkeypatch.setattr(Readout, "baseline", lambda *given: dataclasses.replace(real(*given), factor=1.0))
    assert sweep_deviation(family, "paper") > SEEN


@pytest.mark.parametrize("family", FUSED)
def test_the_halves_of_a_fused_projection_exchanged(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Mlp.point

    def gate_for_up(self: Mlp, basis: str) -> HookPoint:
        return dataclasses.replace(real(self, basis), start=0)

    monkeypatch.setattr(Mlp, "point", gate_for_up)
    assert neurgrad_deviation(family, "paper", LENGTHS) > SEEN


@pytest.mark.parametrize("family", OF_EACH_KIND)
def test_one_basis_taken_for_another(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Mlp.point
    monkeypatch.setattr(Mlp, "point", lambda self, _basis: real(self, "hidden"))
    for basis in set(bases_of(family)) - {"hidden"}:
        # In a plain MLP `paper` and `hidden` are the same tensor.
        is_other = len(bases_of(family)) == 3
        assert (neurgrad_deviation(family, basis, LENGTHS) > SEEN) == is_other


@pytest.mark.parametrize("family", NORM_AFTER_MLP)
def test_adding_to_the_residual_what_the_norm_after_the_mlp_would_change(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Interventions, "_run", _on_the_residual)
    assert sweep_deviation(family, "hidden") > SEEN


def test_adding_to_the_residual_is_right_without_such_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    # So that the trap above is what it says it is.
    monkeypatch.setattr(Interventions, "_run", _on_the_residual)
    assert sweep_deviation("Llama 2", "hidden") < 1e-6


def _on_the_residual(self: Interventions, moved: Sequence[Moved]) -> Changes:
    return joined([_of_site(self, *own) for own in moved])


def _of_site(self: Interventions, site: Site, neurons_r: Tensor, shifts_r: Tensor) -> Changes:
    n_rows, own = len(shifts_r) + 1, self._layers[site.layer]
    inputs, output_structures = self._layer_inputs
    columns_rd = own.get_submodule("mlp.down_proj").weight.T[neurons_r] * shifts_r[:, None]

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden.view(n_rows, -1)[1:] += columns_rd
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = own.register_forward_hook(add)
    stored = self.rows.expand_rows(inputs[site.layer], n_rows)
    started = start_at_layer(self._layers, site.layer, stored, output_structures)
    with torch.no_grad(), started, self._readout.differences([n_rows]) as head_rv:
        self.rows.run([n_rows])
    handle.remove()
    read = self._readout.rows_read(self._baseline, head_rv[0][1:], self._target_ids)
    return Changes(read.log_p_rk, read.logit_rk)


def test_dropout_that_is_left_on() -> None:
    config = hf.GPT2Config(
        vocab_size=97, n_layer=2, n_embd=24, n_head=4, n_positions=64, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5
    )
    wrapped = hf.AutoModelForCausalLM.from_config(config).train()
    model = LanguageModel(wrapped, tiny_tokenizer())
    assert not any(part.training for part in model.model.modules())
    first, second = (neg_service.neurgrad(model, ["w1 w2 w3"], [[" w7"]]).neurgrad for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_the_tail_of_a_softmax_in_low_precision() -> None:
    # Logits so large that the improbable target's p is below what float16 holds, and its gradient with it.
    model = tiny_model("Llama 2", torch.float16)
    model.model.lm_head.weight.mul_(8)
    logits = model.model(torch.tensor([[1, 2, 3]])).logits[0, -1]
    target = int(logits.argmin())
    assert logits.softmax(-1)[target] == 0
    found = neg_service.neurgrad(model, ["w1 w2 w3"], [[f" w{target}"]])
    assert 0 < found.probability[0, 0] < 1e-7
    assert (found.neurgrad != 0).mean() > 0.9


@pytest.mark.model
def test_a_header_split_where_its_text_ends(smollm2: LanguageModel) -> None:
    header = "One two three four.\n" * 10 + "\n"
    texts = [header + end for end in ("\nFive six", "###seven", "eight")]
    encoded = list(encode(smollm2.tokenizer, [Prompt(str(i), t, (" one",)) for i, t in enumerate(texts)], None))
    # The text's common beginning is longer than the tokens': its last characters merge with what follows.
    of_text = len(smollm2.tokenizer(header)["input_ids"])
    of_tokens = next(i for i, ids in enumerate(zip(*(p.ids for p in encoded), strict=False)) if len(set(ids)) > 1)
    assert of_tokens < of_text
    (group,) = group_by_prefix([p.ids for p in encoded])
    assert group.shared == of_tokens
    run = dict(gradients(smollm2, encoded, [(0,)] * 3, "paper", [29], Budget(2**28)))
    for i, prompt in enumerate(encoded):
        smollm2.forget_prefixes()
        ((_, alone),) = gradients(smollm2, [prompt], [(0,)], "paper", [29], Budget(2**28))
        largest = np.abs(alone.gradient_kln).max()
        np.testing.assert_allclose(run[i].gradient_kln, alone.gradient_kln, rtol=1e-3, atol=1e-4 * largest)


def _change_the_view(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    real = prefix_attention.View
    monkeypatch.setattr(prefix_attention, "View", lambda *given: change(real(*given)))


def _added(output: Any, column: torch.Tensor) -> Any:
    hidden = (output[0] if isinstance(output, tuple) else output).clone()
    hidden[0, -1] += column
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
