"""A zoo of silent faults: each went wrong somewhere in this field, is rebuilt on a tiny model, and has to be seen.

Every one gives plausible numbers. Faults of passes are made where the package's own code runs rows, so that the plain
model is as it was: the self-check has to see that they differ. Faults of a model itself, whose gradients are not what
its output does, are made in the model. Faults of files are in `test_zoo_files.py`. `seen` is what is said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neg_service import LanguageModel
from neg_service.errors import ModelError
from neg_service.models import experts_classes, experts_function
from neg_service.models.engines import frozen_cache, kv_cache, prefix_attention, recurrent_state, shared_prefix
from neg_service.models.feed_forward import HookPoint, Mlp
from tests.mixtures import MIXTURES, tiny_mixture
from tests.tiny_models import FAMILIES, HYBRIDS, tiny_model

Patch = pytest.MonkeyPatch
Wrong = Callable[[nn.Module], AbstractContextManager[Any]]


def fresh(family: str, seed: int = 0) -> LanguageModel:
    return tiny_mixture(family, seed=seed) if family in MIXTURES else tiny_model(family, seed=seed)


def seen(model: LanguageModel, engine: str) -> str:
    """What the self-check says against an engine."""
    try:
        rejected = model.ensure_checked().rejected
    except ModelError as error:
        rejected = dict(re.findall(r"(\w+): (.*?)(?=; \w+: |: choose)", str(error)))
    return rejected.get(engine, "")


@contextmanager
def changed(place: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


@contextmanager
def hooked(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _module, _inputs, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def in_rows(patch: Patch, wrong: Wrong) -> None:
    """Let rows over a shared prefix run while something is wrong."""
    real = shared_prefix.run_last_tokens

    def run(model: Any, *given: Any) -> Tensor:
        with wrong(model.module):
            return real(model, *given)

    patch.setattr(shared_prefix, "run_last_tokens", run)


# --- faults of passes


def residual_scaled_twice(patch: Patch) -> None:
    in_rows(
        patch, lambda m: changed(m.model.layers[1], "residual_multiplier", m.model.layers[1].residual_multiplier ** 2)
    )


def norm_with_another_epsilon(patch: Patch) -> None:
    in_rows(patch, lambda m: changed(m.model.layers[1].post_attention_layernorm, "variance_epsilon", 1e-3))


def activation_of_another_name(patch: Patch) -> None:
    in_rows(patch, lambda m: changed(m.model.layers[1].mlp, "act_fn", nn.GELU()))


def layers_in_another_order(patch: Patch) -> None:
    @contextmanager
    def swapped(m: nn.Module) -> Iterator[None]:
        layers = m.model.layers
        layers[0], layers[1] = layers[1], layers[0]
        yield
        layers[0], layers[1] = layers[1], layers[0]

    in_rows(patch, swapped)


def head_that_is_tied_though_it_is_not(patch: Patch) -> None:
    in_rows(patch, lambda m: changed(m.lm_head, "weight", m.model.embed_tokens.weight))


def bias_left_out(patch: Patch) -> None:
    in_rows(patch, lambda m: changed(m.model.layers[0].self_attn.q_proj, "bias", None))


def angles_of_the_wrong_layer_kind(patch: Patch) -> None:
    @contextmanager
    def global_everywhere(m: nn.Module) -> Iterator[None]:
        rotary = m.model.rotary_emb
        real = rotary.forward
        with changed(rotary, "forward", lambda x, position_ids, _kind: real(x, position_ids, "full_attention")):
            yield

    in_rows(patch, global_everywhere)


def view_without(name: str, value: Any = None) -> Callable[[Patch], None]:
    def spring(patch: Patch) -> None:
        real = prefix_attention.View

        def other(*given: Any) -> Any:
            view = real(*given)
            return view.__class__(**{**view.__dict__, name: value(view) if callable(value) else value})

        patch.setattr(prefix_attention, "View", other)

    return spring


def positions_by_row_index(patch: Patch) -> None:
    real = shared_prefix.packed
    patch.setattr(shared_prefix, "packed", lambda m, ids, places: real(m, ids, [range(len(row)) for row in places]))


def padding_that_is_attended_to(patch: Patch) -> None:
    patch.setattr(prefix_attention.RowPass, "hidden_keys", lambda self, window, device: (None, None))


def nothing_but_nan(patch: Patch) -> None:
    in_rows(patch, lambda m: hooked(m.model.layers[1], lambda out: torch.full_like(out, torch.nan)))


def shared_prefix_in_another_order(patch: Patch) -> None:
    real = shared_prefix.run_prefix

    def rolled(*given: Any) -> Any:
        prefix = real(*given)
        for keys in prefix.keys_bgtd.values():
            keys.copy_(keys.roll(1, 2))
        return prefix

    patch.setattr(shared_prefix, "run_prefix", rolled)


def neurons_of_another_token(patch: Patch) -> None:
    real = shared_prefix.SharedPrefixRows.positions
    patch.setattr(shared_prefix.SharedPrefixRows, "positions", lambda self, counts: real(self, counts).roll(-1))


def shared_expert_left_out(patch: Patch) -> None:
    in_rows(patch, lambda m: hooked(m.model.layers[1].mlp.shared_experts, lambda out: 0 * out))


def wrong_expert(patch: Patch) -> None:
    with_experts(patch, lambda module, hidden, index, weights: (hidden, (index + 1) % len(module.down_proj), weights))


def weights_of_another_expert(patch: Patch) -> None:
    with_experts(patch, lambda module, hidden, index, weights: (hidden, index, weights.flip(-1)))


def routing_of_another_row(patch: Patch) -> None:
    with_experts(patch, lambda module, hidden, index, weights: (hidden, index[:1].expand_as(index), weights))


def routers_gradient_left_out(patch: Patch) -> None:
    # The loss is right.
    with_experts(patch, lambda module, hidden, index, weights: (hidden, index, weights.detach()))


def with_experts(patch: Patch, change: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    functions = experts_classes.INTERFACE.ALL_EXPERTS_FUNCTIONS
    real = functions[experts_function.EXPERTS]
    patch.setitem(
        functions._global_mapping,
        experts_function.EXPERTS,
        lambda module, *given: real(module, *change(module, *given)),
    )


def cache_changed_in_place(patch: Patch) -> None:
    real = frozen_cache._FrozenAttention.update

    def in_place(self: Any, keys: Tensor, values: Tensor, *given: Any) -> Any:
        found = real(self, keys, values, *given)
        # As long as it was: one that grows is found by shapes.
        self.keys, self.values = (own[:1, :, 1:] for own in found)
        return found

    patch.setattr(frozen_cache._FrozenAttention, "update", in_place)


def state_that_is_not_frozen(patch: Patch) -> None:
    def written(self: Tensor, new: Tensor) -> Tensor:
        # In all rows, which share it.
        return torch.Tensor.copy_(self[:1].as_subclass(Tensor), new[:1].detach())

    patch.setattr(frozen_cache._ReadOnly, "copy_", written)


def state_that_forgets_the_first_block(patch: Patch) -> None:
    real = recurrent_state.filled
    patch.setattr(recurrent_state, "filled", lambda model, ids, *given: real(model, ids[-64:], *given))


def sparse_attention_that_is_dense_in_rows(patch: Patch) -> None:
    real = kv_cache.KeyValueCacheRows.run

    def dense(self: Any, counts: Any) -> Tensor:
        indexers = [own for own in self._model.module.modules() if hasattr(own, "index_topk")]
        limits = [own.index_topk for own in indexers]
        for own in indexers:
            own.index_topk = 10**6
        found = real(self, counts)
        for own, limit in zip(indexers, limits, strict=True):
            own.index_topk = limit
        return found

    patch.setattr(kv_cache.KeyValueCacheRows, "run", dense)


def another_tensor_under_the_neurons_name(patch: Patch) -> None:
    real = Mlp.point
    patch.setattr(Mlp, "point", lambda self, basis: real(self, "gate" if basis == "paper" else basis))


def an_output_with_the_residual_added(patch: Patch) -> None:
    real = HookPoint.neurons

    def added(self: HookPoint, x: Tensor) -> Tensor:
        found = real(self, x)
        return found + 0.1 * x.mean(-1, keepdim=True) if self.side == "input" else found

    patch.setattr(HookPoint, "neurons", added)


OFF_LOGITS, OFF_NEURONS = "row logits are", "captured neurons are"

PASSES: list[tuple[Callable[[Patch], None], str, str]] = [
    (residual_scaled_twice, "Granite", OFF_LOGITS),
    (norm_with_another_epsilon, "Llama 2", OFF_LOGITS),
    (activation_of_another_name, "Gemma", OFF_LOGITS),
    (layers_in_another_order, "Llama 2", OFF_LOGITS),
    (head_that_is_tied_though_it_is_not, "Llama 2", OFF_LOGITS),
    (bias_left_out, "Qwen 2 and 2.5", OFF_LOGITS),
    (angles_of_the_wrong_layer_kind, "Gemma 3", OFF_LOGITS),
    (view_without("softcap"), "Gemma 2", OFF_LOGITS),
    (view_without("window"), "Mistral", OFF_LOGITS),
    (view_without("sinks"), "gpt-oss", OFF_LOGITS),
    (view_without("chunk"), "Llama 4", OFF_LOGITS),
    (view_without("scaling", lambda view: 1.1 * view.scaling), "Llama 3", OFF_LOGITS),
    (positions_by_row_index, "GPT-2", OFF_LOGITS),
    (padding_that_is_attended_to, "Llama 2", OFF_LOGITS),
    (nothing_but_nan, "Llama 2", OFF_LOGITS),
    (shared_prefix_in_another_order, "OLMo", OFF_LOGITS),
    (neurons_of_another_token, "Llama 2", "neurons at the readout position are"),
    (shared_expert_left_out, "DeepSeek 3", OFF_LOGITS),
    (wrong_expert, "Mixtral", "experts are"),
    (weights_of_another_expert, "Qwen 3 MoE", "experts are"),
    (routing_of_another_row, "OLMoE", "experts are"),
    (routers_gradient_left_out, "Mixtral", "gradients are"),
    (cache_changed_in_place, "GPT-J", OFF_LOGITS),
    (state_that_is_not_frozen, "Bamba", OFF_LOGITS),
    (state_that_forgets_the_first_block, "Qwen 3.5", OFF_LOGITS),
    (sparse_attention_that_is_dense_in_rows, "DeepSeek 3.2, below its limit", OFF_LOGITS),
    (another_tensor_under_the_neurons_name, "Llama 2", OFF_NEURONS),
    (an_output_with_the_residual_added, "Llama 2", OFF_NEURONS),
]


@pytest.mark.parametrize(("spring", "family", "says"), PASSES)
def test_a_fault_of_passes_is_seen(spring: Callable[[Patch], None], family: str, says: str, monkeypatch: Patch) -> None:
    model = fresh(family)
    spring(monkeypatch)
    engine = {**FAMILIES, **HYBRIDS, **MIXTURES}[family].engine
    # Of difference arithmetic the rows that it stands on are compared first.
    assert says in seen(model, (engine.refines or engine).name)


def test_a_window_that_only_the_mask_knows() -> None:
    # As Phi-3.5's layers have one: no argument of attention names it.
    assert OFF_LOGITS in fresh("Phi-3.5 MoE").ensure_checked().rejected["shared_prefix"]


# --- faults of the model itself: its gradients are not what its output does


def dropped(linear: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.linear(x, linear.weight).detach()


def nearly_zero(linear: nn.Module, x: Tensor) -> Tensor:
    out = nn.functional.linear(x, linear.weight)
    return out.detach() + 1e-3 * (out - out.detach())


def staircase(linear: nn.Module, x: Tensor) -> Tensor:
    scale = x.detach().abs().amax(-1, keepdim=True) / 127
    return nn.functional.linear((x / scale).round() * scale, linear.weight)


@pytest.mark.parametrize("kernel", [dropped, nearly_zero, staircase])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_quantised_layers_gradient_is_seen(kernel: Callable[..., Tensor], layer: int) -> None:
    model = fresh("Llama 2")
    own = model.model.model.layers[layer].mlp.down_proj
    own.forward = kernel.__get__(own)
    assert "small shifts of neurons move the output" in seen(model, "shared_prefix")


# --- no false alarm


@pytest.mark.parametrize("family", ["Llama 2", "Gemma 2", "GPT-J", "BERT", "Falcon-H1", "DeepSeek 3", "gpt-oss"])
def test_what_is_right_is_not_refused(family: str) -> None:
    # `tests/false_alarms.py` does so for all families.
    expected = {**FAMILIES, **HYBRIDS, **MIXTURES}[family].engine
    for seed in range(1, 4):
        assert type(fresh(family, seed).ensure_checked().engine) is expected, seed
