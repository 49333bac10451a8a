"""Models whose tokens are bytes: layers on bytes on both sides of a transformer on patches, against plain passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import neg_service
from neg_service import LanguageModel
from neg_service.errors import ConfigurationError, ModelError
from neg_service.measures.gradients import gradients
from neg_service.measures.interventions import Interventions
from neg_service.measures.positions import position_map
from neg_service.models.batches import Budget
from neg_service.models.byte_patches import layers_on_bytes
from neg_service.models.dimensions import context_length
from neg_service.models.engines.full_sequence import FullSequenceEngine
from neg_service.models.engines.needs import lacks_dense_attention, lacks_keys_and_values
from neg_service.models.inspection import inspect_model
from neg_service.models.placement import device_map
from neg_service.models.precision import in_precision
from neg_service.models.source import fetch
from neg_service.models.start_at_layer import start_at_layer
from tests import sequences
from tests.configurations import fill, small_config, tiny
from tests.oracle import relative
from tests.refusals import refused
from tests.sequences import TARGETS, encoded
from tests.tiny_models import tiny_tokenizer

BASES = ("paper", "hidden", "gate")
# Longer than the windows of both attentions, of several patches; and of one byte.
TEXT = (3, 14, 15, 9, 41, 20, 7, 8, 77, 33, 60, 2, 51, 19, 84, 40, 5)
WORDS = " ".join(f"w{token}" for token in TEXT)
PROMPTS = [encoded(TEXT, TARGETS, "a"), encoded(TEXT[:5], [(7,), (8,)], "b"), encoded(TEXT[:1], [(7, 8)], "c")]
SHIFTS = [-2.0, 0.1]
# Two in the encoder and four in the decoder.
N_LAYERS = 6


def plain(**options: Any) -> Any:
    """The tiny model as transformers makes it, always of the same weights."""
    model = tiny("blt", is_masked=False)
    return remade(model, **options).eval() if options else model.eval()


def remade(model: Any, **options: Any) -> Any:
    config = small_config("blt")
    for name, value in options.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    made = type(model)(config)
    fill(made)
    return made


def measured(**options: Any) -> LanguageModel:
    return LanguageModel(plain(**options), tiny_tokenizer())


@cache
def checked() -> LanguageModel:
    model = measured()
    model.ensure_checked_for_trees()
    return model


@contextmanager
def in_float64(*models: Any) -> Iterator[None]:
    """Also where modeling code casts to float32, and for passes back."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(in_precision(model, [], torch.float64))
        yield


@torch.no_grad()
def logits(model: Any, ids: Sequence[int]) -> Tensor:
    found: Tensor = model(torch.tensor([list(ids)]), use_cache=False).logits
    return found[0]


def patches(model: Any, ids: Sequence[int]) -> list[int]:
    """How many bytes the patches of a text have, as the patcher itself says."""
    config = model.config
    _, lengths, _ = model.model._modules["patcher"](
        torch.tensor([list(ids)]), patch_size=config.patch_size, threshold=config.patching_threshold
    )
    return [int(length) for length in lengths[0]]


def test_texts_have_patches_of_one_and_of_several_bytes() -> None:
    found = patches(plain(), TEXT)
    assert sum(found) == len(TEXT)
    assert len({*found} - {0}) >= 3
    assert patches(plain(), TEXT[::-1]) != found


def test_layers_are_those_on_bytes_in_the_order_in_which_they_run() -> None:
    model = measured()
    body, layers = model.model.model, model.feed_forward.layers
    assert list(layers) == [*body.local_encoder.layers, *body.local_decoder.layers]
    assert model.feed_forward.neurons_by_layer == (48,) * N_LAYERS
    ran: list[int] = []
    handles = [
        layer.register_forward_hook(lambda _m, args, _o, i=i: ran.append(i) if args[0].shape[1] == len(TEXT) else None)
        for i, layer in enumerate(layers)
    ]
    model.model(torch.tensor([TEXT]), use_cache=False)
    assert ran == list(range(N_LAYERS))
    assert len(handles) == N_LAYERS


@pytest.mark.parametrize("basis", BASES)
def test_gradients_are_those_of_plain_passes(basis: str) -> None:
    model, own = checked(), plain()
    with in_float64(model.model, own):
        wanted = [range(len(prompt.target_ids)) for prompt in PROMPTS]
        for i, found in gradients(model, PROMPTS, wanted, basis, list(range(N_LAYERS)), Budget(2**28)):
            for k, target in enumerate(PROMPTS[i].target_tokens):
                p, slope_tln, activation_tln = sequences.gradients(own, PROMPTS[i].ids, target, basis)
                np.testing.assert_allclose(found.probability_k[k], p, rtol=1e-6)
                assert relative(found.activation_ln, activation_tln[0]) <= 1e-6
                # Of each layer by itself: the last one's are the largest. They are handed out in float32.
                for found_n, slope_n in zip(found.gradient_kln[k], slope_tln[0], strict=True):
                    assert relative(found_n, slope_n) <= 1e-6
                    assert abs(slope_n).max() > 0


# Each prompt in one basis; the rest is run with the faults.
OFTEN = {("a", "paper"), ("b", "hidden"), ("c", "gate")}
EACH = [
    pytest.param(prompt, basis, id=f"{prompt.prompt.id}-{basis}", marks=marks)
    for prompt in PROMPTS
    for basis in BASES
    for marks in [() if (prompt.prompt.id, basis) in OFTEN else pytest.mark.faults]
]


@pytest.mark.parametrize(("prompt", "basis"), EACH)
def test_interventions_are_those_of_plain_passes(prompt: Any, basis: str) -> None:
    model, own = checked(), plain()
    with in_float64(model.model, own):
        interventions = Interventions(model, prompt, basis)
        before = [sequences.shifted(own, prompt.ids, target, basis, [], 0.0) for target in prompt.target_tokens]
        np.testing.assert_allclose(interventions.probability_k.numpy(), before, rtol=1e-12)
        for layer in range(N_LAYERS):
            (site,), neuron = interventions.sites([layer]), 5 + 7 * layer
            found, _ = interventions.delta_log_p(
                site, torch.tensor([neuron] * 2), torch.tensor(SHIFTS, dtype=torch.float64), Budget(2**28)
            )
            for s, shift in enumerate(SHIFTS):
                for k, target in enumerate(prompt.target_tokens):
                    after = sequences.shifted(own, prompt.ids, target, basis, [(layer, neuron)], shift)
                    expected = np.log(after) - np.log(before[k])
                    assert abs(float(found[s, k]) - expected) <= 1e-9 * abs(expected) + 1e-13
                    assert expected != 0


def test_the_self_check_leaves_whole_passes() -> None:
    model = measured()
    selection = model.ensure_checked_for_trees()
    assert type(model.engine) is FullSequenceEngine
    for reason in (lacks_dense_attention(model.model), lacks_keys_and_values(model.model)):
        assert reason is not None
        assert "patches of several bytes" in reason
    # Between two layers other layers run.
    assert not selection.check.starts_at_layers
    with refused(ModelError, "model.engine", "kv_cache", says="patches of several bytes"):
        LanguageModel(plain(), tiny_tokenizer(), engine="kv_cache").ensure_checked()


def test_what_is_put_in_a_layers_place_runs_there() -> None:
    model = plain()
    found = layers_on_bytes(model)
    assert found is not None
    path, layers = found
    assert path == "model.local_decoder.layers"
    encoder, decoder = model.model.local_encoder.layers, model.model.local_decoder.layers
    own = list(layers)
    with start_at_layer(layers, 4, torch.zeros(1, 1, 32), [None] * N_LAYERS):
        assert [type(layer).__name__ for layer in (*encoder, *decoder)] == ["CachedLayer"] * 4 + [
            "BltTransformerLayer"
        ] * 2
        assert list(layers) == [*encoder, *decoder]
    assert [*encoder, *decoder] == own == list(layers)
    assert layers_on_bytes(tiny("llama", is_masked=False)) is None


def test_patches_are_those_of_a_text_alone_and_found_once() -> None:
    model, own = measured().model, plain()
    # Texts with other numbers of patches, some of them twice.
    texts = torch.tensor([TEXT, TEXT[::-1], TEXT, (7,) * len(TEXT)])
    assert len({len(patches(own, text.tolist())) for text in texts}) > 1
    n_rows: list[int] = []
    # The patcher stays where it was.
    handle = model.model._modules["patcher"].register_forward_hook(lambda _m, args, _o: n_rows.append(len(args[0])))
    found = model(texts, use_cache=False).logits
    handle.remove()
    assert n_rows == [1, 1, 1]
    for text, own_tv in zip(texts, found, strict=True):
        torch.testing.assert_close(own_tv, logits(own, text.tolist()), rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == own.state_dict().keys()


def test_patches_of_a_length_at_most_leave_targets_of_one_token() -> None:
    model, own = measured(max_patch_length=2), plain(max_patch_length=2)
    # What is behind a byte changes what it sees, where that byte ends a patch.
    whole_tv = logits(own, TEXT)
    changes = [float((logits(own, TEXT[:n])[-1] - whole_tv[n - 1]).abs().max()) for n in range(1, len(TEXT))]
    assert min(changes) < 1e-4
    assert max(changes) > 1e-2
    prompt = encoded(TEXT, [(7,), (8,)])
    model.ensure_checked()
    found = neg_service.neurgrad(model, [WORDS], [[" w7", " w8"]])
    for k, target in enumerate(prompt.target_tokens):
        p, slope_tln, activation_tln = sequences.gradients(own, TEXT, target, "paper")
        np.testing.assert_allclose(found.probability[0, k], p, rtol=1e-5)
        expected = slope_tln[0] * np.where(activation_tln[0] < 0, -1, 1)
        assert relative(found.neurgrad[0, k], expected) <= 1e-4
    with refused(ModelError, "model.engine", says="depends on the bytes behind it"):
        model.ensure_checked_for_trees()
    with refused(ModelError, "dataset.not_one_token", says="depends on the bytes behind it"):
        position_map(model, encoded(TEXT, TARGETS), "paper")


def test_without_a_patcher_each_byte_is_a_patch() -> None:
    model, own = measured(patch_in_forward=False), plain(patch_in_forward=False)
    assert own.model.patcher is None
    found = neg_service.neurgrad(model, [WORDS], [[" w7 w8"]], not_one_token="sequence")
    p, slope_tln, activation_tln = sequences.gradients(own, TEXT, (7, 8), "paper")
    np.testing.assert_allclose(found.probability[0, 0], p, rtol=1e-5)
    assert relative(found.neurgrad[0, 0], slope_tln[0] * np.where(activation_tln[0] < 0, -1, 1)) <= 1e-4
    # A patch more than bytes.
    own.config.global_config.max_position_embeddings = 20
    assert context_length(own) == 19


@pytest.mark.parametrize("part", ["encoder_config", "decoder_config", "patcher_config"])
def test_the_context_is_the_least_of_what_runs_on_bytes(part: str) -> None:
    model = plain()
    assert context_length(model) == 256
    model.config.global_config.max_position_embeddings = 8
    model.config.max_position_embeddings = 8
    assert context_length(model) == 256
    getattr(model.config, part).max_position_embeddings = 20
    assert context_length(model) == 20


def test_what_is_behind_a_byte_changes_nothing_without_such_a_length() -> None:
    own = plain()
    whole_tv = logits(own, TEXT)
    for n in range(1, len(TEXT)):
        torch.testing.assert_close(logits(own, TEXT[:n])[-1], whole_tv[n - 1], rtol=1e-4, atol=1e-4)


def test_a_folder_is_loaded_and_inspected(tmp_path: Path) -> None:
    plain().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = neg_service.load_model(tmp_path)
    found = neg_service.neurgrad(model, [WORDS], [[" w7"]])
    p, slope_tln, activation_tln = sequences.gradients(plain(), TEXT, (7,), "paper")
    expected = slope_tln[0] * np.where(activation_tln[0] < 0, -1, 1)
    assert relative(found.neurgrad[0, 0], expected) <= 1e-5
    assert found.probability[0, 0] == pytest.approx(p, rel=1e-5)
    info = inspect_model(fetch(str(tmp_path)))
    assert (info.n_layers, info.n_neurons, info.context_length) == (N_LAYERS, 48, 256)
    assert info.n_layers == model.feed_forward.n_layers
    assert info.layer_neurons == model.feed_forward.layer_neurons
    assert info.n_parameters == sum(weight.numel() for weight in model.model.parameters())
    assert (info.n_input_ids, info.n_output_ids) == (model.n_input_ids, model.n_output_ids) == (97, 97)
    assert info.engine == model.engine.name == "full_sequence"
    # A layer has 4·32² weights of attention, 3·32·48 of its MLP and two norms; they are all met, and so are others'.
    assert info.token_weights > N_LAYERS * (4 * 32**2 + 3 * 32 * 48)
    assert info.head_weights == 97 * 32


def test_in_low_precision_patches_are_those_of_the_plain_model() -> None:
    own = plain().to(torch.bfloat16)
    model = LanguageModel(plain().to(torch.bfloat16), tiny_tokenizer())
    # Of some hundred bytes, which many rows would round otherwise.
    ids = torch.randint(1, 97, (1, 200), generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    model.model.model._modules["patcher"].register_forward_hook(lambda _m, _a, output: seen.append(output[0]))
    own.model._modules["patcher"].register_forward_hook(lambda _m, _a, output: seen.append(output[0]))
    model.model(ids.repeat(33, 1), use_cache=False)
    own(ids, use_cache=False)
    assert torch.equal(*seen)
    found = neg_service.neurgrad(model, [WORDS], [[" w7"]])
    p_v = logits(own, TEXT)[-1].softmax(-1)
    assert found.probability[0, 0] == pytest.approx(float(p_v[7]), rel=0.05)


def test_several_devices_are_refused() -> None:
    with refused(ConfigurationError, "model.device", says="use one device"):
        device_map(plain(), [torch.device("cuda:0"), torch.device("cuda:1")])
