"""Every family of mixtures against experts that run token by token, traps that are sprung, and the check of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import neg_service
from neg_service import LanguageModel
from neg_service.errors import ConfigurationError, ModelError, NonFiniteError
from neg_service.measures import measure_of
from neg_service.measures.gradients import gradients
from neg_service.measures.interventions import Interventions
from neg_service.models import experts_classes, experts_function, shared_experts
from neg_service.models.batches import Budget
from neg_service.models.engines import prefix_attention
from neg_service.models.engines.base import LoadedModel
from neg_service.models.engines.shared_prefix import SharedPrefixEngine
from neg_service.models.experts import _FORWARDS
from neg_service.models.feed_forward import Site, find_feed_forward
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from neg_service.prompts.tokens import encode
from tests import mixture_families
from tests.families import JOINT_TOLERANCE, NEURGRAD_TOLERANCE, SWEEP_TOLERANCE
from tests.mixture_families import joint_deviation, model_of, neurgrad_deviation, sweep_deviation
from tests.mixtures import MIXTURES, tiny_mixture
from tests.refusals import refused
from tests.shards import measured_shard

# `make families` compares all bases of all families; here one, and all where experts compute otherwise than others.
BASES = [
    *((family, "paper") for family in MIXTURES),
    *((own, b) for own in ("gpt-oss", "Llama 4", "JetMoE", "LongCat Flash", "Inkling") for b in ("hidden", "gate")),
]
# Each makes its experts, its routing, what stands beside them or its attention in another way; the others share theirs
# with one of these.
OF_EACH_KIND = (
    "Mixtral", "Qwen 2 MoE", "gpt-oss", "DeepSeek 3", "Granite MoE, shared", "Phi-3.5 MoE", "Llama 4", "Gemma 4 MoE",
    "ERNIE 4.5 MoE", "Laguna", "Qwen 3.5 MoE", "Granite 4 MoE", "DBRX", "JetMoE", "LongCat Flash", "Inkling",
)  # fmt: skip
SHIFTED = [
    pytest.param(family, basis, marks=() if family in OF_EACH_KIND else pytest.mark.faults) for family, basis in BASES
]
# A sprung trap moves results by this at least; right ones agree to 2e-5.
SEEN = 1e-3
# Unequal lengths, one token, longer than windows and chunks.
LENGTHS = (1, 9, 12)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_self_check_passes_and_chooses_the_engine(family: str) -> None:
    chosen = model_of(family).ensure_checked()
    assert type(chosen.engine) is MIXTURES[family].engine
    assert chosen.check.logits < 1e-5
    assert chosen.check.experts is not None
    assert chosen.check.experts < 1e-6
    assert chosen.check.finite_difference is not None
    assert chosen.check.finite_difference < 0.02


@pytest.mark.parametrize(("family", "basis"), BASES)
def test_neurgrad_of_every_used_expert_equals_a_backward_pass_a_target(family: str, basis: str) -> None:
    assert neurgrad_deviation(family, basis, LENGTHS) <= NEURGRAD_TOLERANCE


@pytest.mark.parametrize("family", ["gpt-oss", "DeepSeek 3", "Llama 4"])
def test_with_a_shared_header(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neg_service.models.batches.PASS_COST", 0)
    assert neurgrad_deviation(family, "paper", (1, 6, 3), header=8) <= NEURGRAD_TOLERANCE
    assert {len(ids) for ids, _ in model_of(family).engine.prefixes._kept} >= {8}


@pytest.mark.parametrize(("family", "basis"), SHIFTED)
def test_a_sweep_equals_full_forward_passes_also_where_routing_changes(family: str, basis: str) -> None:
    assert sweep_deviation(family, basis) <= SWEEP_TOLERANCE


@pytest.mark.parametrize(("family", "basis"), SHIFTED)
def test_joint_interventions_equal_full_forward_passes(family: str, basis: str) -> None:
    assert joint_deviation(family, basis) <= JOINT_TOLERANCE


# --- traps


def is_seen(compare: Callable[[], float]) -> bool:
    """Whether a comparison sees that something is wrong: in numbers, or in which experts there are."""
    try:
        return compare() > SEEN
    except AssertionError:
        return True


@pytest.fixture(autouse=True)
def _checked_before() -> None:
    """The self-check would see most traps itself; here it has passed before they are sprung."""
    for family in ("Mixtral", "gpt-oss", "DeepSeek 3", "Llama 4"):
        model_of(family).ensure_checked()


def test_experts_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    real = experts_function.note_routing
    monkeypatch.setattr(
        experts_function, "note_routing", lambda own, experts, weights: real(own, experts.flip(-1), weights)
    )
    assert is_seen(lambda: neurgrad_deviation("Mixtral", "paper", LENGTHS))


def test_neurons_that_hold_the_routers_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    class Weighted(experts_function._Run):
        def at(self, basis: str, x_sn: Tensor, *beside: Tensor) -> list[Tensor]:
            weight_s1 = self.slots.of_experts(self.weight_tk[..., None])
            found, *rest = super().at(basis, x_sn * weight_s1, *beside)
            return [found / weight_s1, *rest]

    monkeypatch.setattr(experts_function, "_Run", Weighted)
    assert is_seen(lambda: neurgrad_deviation("Mixtral", "hidden", LENGTHS))


def test_an_mlp_that_is_always_on_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = LoadedModel.own_experts

    @contextmanager
    def without(self: LoadedModel) -> Iterator[None]:
        shared = [
            layer.mlp.shared_experts for layer in self.feed_forward.layers if hasattr(layer.mlp, "shared_experts")
        ]
        handles = [own.register_forward_hook(lambda _m, _i, out: 0 * out) for own in shared]
        with real(self):
            yield
        for handle in handles:
            handle.remove()

    monkeypatch.setattr(LoadedModel, "own_experts", without)
    assert is_seen(lambda: neurgrad_deviation("DeepSeek 3", "paper", LENGTHS))
    with refused(ModelError, "model.source", says="row logits are"):
        tiny_mixture("DeepSeek 3").ensure_checked()


def test_routing_of_the_row_that_is_not_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    real = experts_function._experts

    def stale(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return real(module, hidden, index[:1].expand_as(index), weights)

    registered = experts_classes.INTERFACE.ALL_EXPERTS_FUNCTIONS
    family = "Mixtral"
    assert any(_changes(family))
    registered.register(experts_function.EXPERTS, stale)
    try:
        assert is_seen(lambda: sweep_deviation(family, "paper"))
    finally:
        registered.register(experts_function.EXPERTS, real)


def _changes(family: str) -> list[float]:
    model = model_of(family)
    slots = neg_service.neurgrad(model, ["w3 w14 w9"], [[" w7"]])
    assert slots.expert is not None
    assert slots.neuron is not None
    asked = [(0, int(n), int(e)) for e, n in zip(slots.expert[0, 0], slots.neuron[0, 0], strict=True)]
    return neg_service.neg(model, "w3 w14 w9", " w7", asked, [-2.0, 2.0]).routing_changed.tolist()


def test_sinks_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    real = prefix_attention.View
    monkeypatch.setattr(prefix_attention, "View", lambda *parts: real(*parts[:-1], None))
    assert is_seen(lambda: neurgrad_deviation("gpt-oss", "paper", LENGTHS))
    assert not isinstance(tiny_mixture("gpt-oss").engine, SharedPrefixEngine)


def test_chunks_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_attention, "_chunk", lambda module: None)
    assert is_seen(lambda: neurgrad_deviation("Llama 4", "paper", LENGTHS))
    assert not isinstance(tiny_mixture("Llama 4").engine, SharedPrefixEngine)


@pytest.mark.parametrize("family", ["Mixtral", "gpt-oss"])
def test_a_gate_that_is_another_familys_is_seen_by_the_check(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = type(model_of(family).feed_forward.experts_modules[0]).__name__
    monkeypatch.setitem(experts_classes._GATES, name, lambda module, gate, up: (torch.sigmoid(gate), up))
    with refused(ModelError, "model.source", says="experts are .* off"):
        tiny_mixture(family).ensure_checked()


def test_identities_that_hand_on_nothing_are_seen_by_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_FORWARDS, experts_classes.LONGCAT, experts_function._experts)
    with refused(ModelError, "model.source", says="experts are .* off"):
        tiny_mixture("LongCat Flash").ensure_checked()


def test_always_on_experts_that_nothing_weighs_are_seen_by_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def unweighed(self: Any, hidden_states: Tensor, gammas: Tensor) -> Tensor:
        return shared_experts.inkling_forward(self, hidden_states, torch.ones_like(gammas))

    monkeypatch.setitem(_FORWARDS, shared_experts.INKLING, unweighed)
    with refused(ModelError, "model.source", says="experts are .* off"):
        tiny_mixture("Inkling").ensure_checked()


# --- what is said of experts


def test_the_librarys_arrays_say_which_neuron_stands_where() -> None:
    model = model_of("DeepSeek 3")
    found = neg_service.neurgrad(model, ["w3 w14 w9", "w5 w2"], [[" w7", " w8"], [" w1"]])
    p, layers, slots = found.activation.shape
    # Dense first layer of 20 neurons; then three experts of 14 and one that is always on of 14.
    assert (p, layers, slots) == (2, 3, 4 * 14)
    assert found.expert is not None
    assert found.neuron is not None
    assert found.expert[:, 0].tolist() == [[-1] * 20 + [-2] * 36] * 2
    assert found.neuron[0, 0].tolist() == [*range(20), *[-2] * 36]
    assert np.isnan(found.neurgrad[:, :, 0, 20:]).all()
    for prompt in range(2):
        for layer in (1, 2):
            experts = found.expert[prompt, layer].reshape(4, 14)
            assert (experts == experts[:, :1]).all()
            assert experts[:3, 0].tolist() == sorted(set(experts[:3, 0].tolist()))
            assert experts[3, 0] == -1
            assert found.neuron[prompt, layer].tolist() == [*range(14)] * 4
    assert np.isfinite(found.neurgrad[0][:, 1:]).all()
    assert neg_service.neurgrad(model, ["w3"], [[" w7"]], layers=[0]).neurgrad.shape == (1, 1, 1, 20)


def test_a_neuron_of_an_expert_that_was_not_chosen_has_no_neg() -> None:
    model = model_of("Mixtral")
    used = neg_service.neurgrad(model, ["w3 w14 w9"], [[" w7"]]).expert
    assert used is not None
    unused = min(set(range(5)) - set(used[0, 1].tolist()))
    found = neg_service.neg(model, "w3 w14 w9", " w7", [(1, 4, unused), (1, 4, int(used[0, 1, 0]))])
    assert found.neurons.tolist() == [[1, 4, unused], [1, 4, used[0, 1, 0]]]
    assert found.is_routed.tolist() == [False, True]
    assert found.neg[0] == found.r[0] == found.routing_changed[0] == found.activation[0] == 0
    assert found.neg[1] != 0
    edits = [{"neurons": [(1, 4, unused)], "set": 5.0}, {"neurons": [(1, 4, int(used[0, 1, 0]))], "set": 5.0}]
    edited = neg_service.intervene(model, ["w3 w14 w9"], [[" w7"]], edits)
    assert edited.n_routed.tolist() == [[0, 1]]
    assert edited.delta_p[0, 0, 0] == 0 != edited.delta_p[0, 1, 0]


def test_what_is_interpolated_is_run_in_full_where_routing_changes() -> None:
    model = model_of("Mixtral")
    neurons = neg_service.neg(model, "w3 w14 w9", " w7", "all", [-1.8, -1.0, 1.0, 1.8])
    changed = neurons.routing_changed > 0
    assert changed.any()
    assert not changed.all()
    asked = neurons.neurons.tolist()
    coarse, full, adaptive = (
        neg_service.neg(model, "w3 w14 w9", " w7", asked, grid=grid) for grid in ("coarse", "full", "adaptive")
    )
    again = coarse.routing_changed > 0
    np.testing.assert_allclose(coarse.neg[again], full.neg[again], rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(coarse.r[again], full.r[again], atol=1e-3)
    np.testing.assert_array_equal(coarse.routing_changed[again], full.routing_changed[again])
    # Also where experts change beyond the largest shift that an interpolation needs.
    at_ends = neg_service.neg(model, "w3 w14 w9", " w7", asked, [-2.0, 2.0]).routing_changed > 0
    assert again[at_ends].all()
    assert (adaptive.n_shifts[adaptive.routing_changed > 0] == 40).all()
    assert (adaptive.routing_changed > 0)[at_ends].all()
    assert (adaptive.n_shifts < 40).any()
    assert coarse.shifts.tolist() == [-1.8, -1.0, 1.0, 1.8]


def test_rounding_that_has_another_expert_chosen_in_another_batch_is_told() -> None:
    model = model_of("Mixtral")
    interventions = Interventions(model, _encoded(model, "w3 w14 w9"), "paper")
    chosen = interventions._experts
    others = {layer: ((own_sk + 1) % 5).sort().values for layer, own_sk in chosen.expert_sk.items()}
    interventions._experts = replace(chosen, expert_sk=others)
    with refused(NonFiniteError, says="rounding has layer 0 choose other experts"):
        interventions.neurgrad(range(3), Budget(2**28))
    with refused(NonFiniteError, says="rounding has layer 2 choose other experts"):
        interventions.delta_log_p(Site(2, True), torch.tensor([3]), torch.tensor([1.0]), Budget(2**28))


def test_values_by_layer_are_refused_where_there_are_experts() -> None:
    model = model_of("Mixtral")
    encoded = [_encoded(model, "w3 w14 w9")]
    ((_, found),) = gradients(model, encoded, [(0,)], "paper", [0, 1], Budget(2**28))
    with refused(ModelError, says="have experts"):
        _ = found.gradient_kln
    with refused(ModelError, says="have experts"):
        _ = found.activation_ln


def test_scores_are_over_the_prompts_that_use_an_expert_however_shards_are_cut() -> None:
    model = model_of("Qwen 3 MoE")
    prompts = [Prompt(f"t/train/{i}", f"w{3 + i} w14 w{9 + i}", (" w7", " w8"), i % 2) for i in range(6)]
    whole, parts = _scores(model, [prompts]), _scores(model, [[prompt] for prompt in prompts])
    assert whole.keys() == parts.keys()
    for key, values in whole.items():
        if key[0].startswith("fires"):
            # Each prompt that uses the expert adds or takes one, and no other does; means are those of a shard.
            n_used = whole["n_used", *key[1:]]
            assert (np.abs(values) <= n_used).all()
            assert ((values - n_used) % 2 == 0).all()
            assert ((parts[key] - n_used) % 2 == 0).all()
        else:
            np.testing.assert_allclose(values, parts[key], rtol=1e-5, atol=1e-5)


def _scores(model: LanguageModel, shards: list[list[Prompt]]) -> dict[tuple[Any, ...], np.ndarray]:
    """By (score, layer, expert), and how many prompts use it."""
    found: dict[tuple[Any, ...], Any] = {}
    for own in shards:
        tables = measured_shard(measure_of({"name": "skill_scores"}), model, own)
        for row in tables["skill_scores"].to_pylist():
            key = (row["score"], row["layer"], row["expert"])
            found[key] = found.get(key, 0) + np.array(row["values"])
        for row in tables["routing"].to_pylist():
            for expert in row["experts"]:
                key = ("n_used", row["layer"], expert)
                found[key] = found.get(key, 0) + np.ones(1)
    return found


def _encoded(model: LanguageModel, text: str) -> EncodedPrompt:
    (encoded,) = encode(model.tokenizer, [Prompt("0", text, (" w7",))], None, model.mask_token)
    return encoded


def test_low_precision_is_checked_in_float32() -> None:
    model = tiny_mixture("Qwen 3 MoE", torch.bfloat16)
    chosen = model.ensure_checked()
    assert isinstance(chosen.engine, SharedPrefixEngine)
    assert chosen.check.logits < 1e-5
    assert chosen.check.finite_difference is None
    assert model.model.dtype == torch.bfloat16
    assert np.isfinite(neg_service.neurgrad(model, ["w3 w14 w9"], [[" w7"]]).neurgrad).all()


@pytest.mark.parametrize(
    ("neurons", "says"),
    [
        ([(1, 4)], r"\(1, 4\) needs an expert, \(layer, neuron, expert\): layer 1 has experts 0 to 4 of 20 neurons"),
        ([(1, 4, 5)], r"\(1, 4, 5\) does not exist; layer 1 has experts 0 to 4"),
        ([(1, 20, 0)], r"\(1, 20, 0\) does not exist"),
        ([(1, 4, -1)], r"\(1, 4, -1\) does not exist"),
    ],
)
def test_neurons_that_do_not_exist(neurons: Any, says: str) -> None:
    with refused(ConfigurationError, "neurons", says=says):
        neg_service.neg(model_of("Mixtral"), "w3", " w7", neurons)
    with refused(ConfigurationError, says=says):
        neg_service.intervene(model_of("Mixtral"), ["w3"], [[" w7"]], [{"neurons": neurons, "shift": 1.0}])


def test_experts_that_are_not_known_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_mixture("Mixtral").model
    kind = type(model.model.layers[0].mlp.experts)
    monkeypatch.setattr(kind, "_apply_gate", lambda self, both: both)
    with refused(ModelError, "model.source", says="MixtralExperts.* have a gate of their own"):
        find_feed_forward(model)
    monkeypatch.undo()
    monkeypatch.setattr(experts_classes, "INTERFACE", None)
    with refused(ModelError, "model.source", says="another interface"):
        find_feed_forward(model)


@pytest.mark.parametrize("n_chosen", [0, 6])
def test_more_experts_than_there_are_and_none_are_refused(n_chosen: int) -> None:
    model = tiny_mixture("Mixtral").model
    model.model.layers[0].mlp.top_k = n_chosen
    with refused(ModelError, "model.source", says=f"a token would use {n_chosen} of its 5 experts"):
        find_feed_forward(model)


def test_experts_that_do_not_ask_the_interface_are_seen() -> None:
    model = tiny_mixture("Mixtral")
    experts = model.feed_forward.experts_modules[1]
    own = type(experts).forward.__wrapped__
    experts.forward = lambda *args: own(experts, *args)
    with refused(ModelError, "model.source", says="does not go through transformers' experts interface"):
        model.ensure_checked()


def test_an_implementation_that_somebody_else_chose_is_left_as_it_was() -> None:
    model = tiny_mixture("Mixtral")
    model.model.config._experts_implementation = "batched_mm"
    before = neg_service.neurgrad(model_of("Mixtral"), ["w3 w14"], [[" w7"]]).neurgrad
    np.testing.assert_allclose(
        neg_service.neurgrad(model, ["w3 w14"], [[" w7"]]).neurgrad, before, rtol=1e-4, atol=1e-7
    )
    assert model.model.config._experts_implementation == "batched_mm"


def test_a_prompt_beyond_llama_4s_first_temperature_is_refused() -> None:
    model = model_of("Llama 4")
    # Its `floor_scale` is 40.
    assert model.context_length == 39
    assert mixture_families.neurgrad_deviation("Llama 4", "paper", (38, 20)) <= NEURGRAD_TOLERANCE
