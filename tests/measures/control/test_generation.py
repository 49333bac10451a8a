"""Text generated with a shift, against a loop by hand: token by token, the whole text each time, no cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

import neg_service
from neg_service import ControlResult, Generated, LanguageModel, control, export_shift, generate, load_shift
from neg_service.errors import ConfigurationError, ModelError, PromptError
from tests import oracle
from tests.measures.control.exports import IDS, PROMPT, TARGET, hooks_of, model_of
from tests.mixtures import tiny_mixture
from tests.refusals import refused
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import words_of_tiny_models

N = 6
AT = ["readout", "all"]


@functools.cache
def steered(family: str, basis: str = "paper", probability: float = 0.4) -> ControlResult:
    """What `control` found for the prompt."""
    return control(model_of(family), PROMPT, TARGET, probability=probability, basis=basis)


@contextmanager
def shifted_by_hand(model: nn.Module, result: ControlResult, basis: str, places: slice) -> Iterator[None]:
    """The neurons of each MLP moved at some positions of a prompt that runs alone."""
    with ExitStack() as stack:
        for row, layer in enumerate(result.layers):
            module, side = oracle.neuron_module(oracle.layers_of(model)[layer], basis)
            start = result.shift.shape[-1] if side.startswith("second") else 0

            def move(x: Tensor, row: int = row, start: int = start) -> Tensor:
                moved = x.clone()
                shift = torch.from_numpy(result.shift[0, row]).to(x.dtype)
                moved.view(-1, x.shape[-1])[places, start : start + len(shift)] += shift
                return moved

            if side == "input":
                own = module.register_forward_pre_hook(lambda _m, inputs, move=move: (move(inputs[0]), *inputs[1:]))
            else:
                own = module.register_forward_hook(lambda _m, _i, output, move=move: move(output))
            stack.callback(own.remove)
        yield


@torch.no_grad()
def written_by_hand(model: Any, ids: Sequence[int], n: int = N) -> list[int]:
    """The most probable tokens behind some, one after the other."""
    found = list(ids)
    for _ in range(n):
        found.append(int(model(torch.tensor([found]), use_cache=False).logits[0, -1].argmax()))
    return found[len(ids) :]


def text(ids: Sequence[int]) -> str:
    """As a tiny model's tokenizer has it."""
    return "".join(f" w{i}" for i in ids)


def places_of(at: str, n: int = len(IDS)) -> slice:
    """The readout position of a prompt of n tokens, or all positions."""
    return slice(n - 1, n) if at == "readout" else slice(None)


@pytest.mark.parametrize("at", AT)
@pytest.mark.parametrize(
    ("family", "basis"),
    [
        ("Llama 2", "paper"),
        ("Qwen 3.5", "hidden"),
        *(
            pytest.param(family, basis, marks=pytest.mark.faults)
            for family, basis in (("Llama 2", "gate"), ("Phi-3 and 4", "paper"), ("OPT", "paper"))
        ),
    ],
)
def test_text_is_that_of_whole_passes_without_a_cache(family: str, basis: str, at: str) -> None:
    model, result = model_of(family), steered(family, basis)
    before = written_by_hand(model.model, IDS)
    with shifted_by_hand(model.model, result, basis, places_of(at)):
        after = written_by_hand(model.model, IDS)
    assert before != after
    found = generate(model, PROMPT, result, n_tokens=N, at=at)
    assert found == Generated(text(before), text(after))
    assert hooks_of(model.model) == 0


def test_where_the_shift_acts_changes_the_text() -> None:
    own = [generate(model_of("Llama 2"), PROMPT, steered("Llama 2", "gate"), n_tokens=N, at=at) for at in AT]
    assert own[0].before == own[1].before
    assert own[0].after != own[1].after


@pytest.mark.parametrize("at", AT)
@pytest.mark.parametrize(("form", "basis"), [("bias", "paper"), ("vector", "hidden")])
def test_an_exported_shift_writes_the_same(form: str, basis: str, at: str, tmp_path: Any) -> None:
    model, result = model_of("Llama 2"), steered("Llama 2", basis)
    place = export_shift(model, result, 0, tmp_path / "shift", form=form, prompt=PROMPT)
    found = generate(model, PROMPT, load_shift(place), n_tokens=N, at=at)
    assert found == generate(model, PROMPT, result, n_tokens=N, at=at)
    assert found.before != found.after


def test_within_an_applied_shift_the_library_generates_the_same(tmp_path: Any) -> None:
    model, result = model_of("Llama 2"), steered("Llama 2")
    place = export_shift(model, result, 0, tmp_path / "shift")
    with load_shift(place).applied(model.model):
        ids = model.model.generate(torch.tensor([IDS]), do_sample=False, max_new_tokens=N, pad_token_id=0)
    assert text(ids[0, len(IDS) :].tolist()) == generate(model, PROMPT, result, n_tokens=N).after


@pytest.mark.parametrize("at", AT)
# The first layer of MiniMax keeps its state beside the cache.
@pytest.mark.parametrize("family", ["Qwen 3 MoE", "MiniMax"])
def test_neurons_of_experts_are_shifted_where_a_token_uses_them(family: str, at: str) -> None:
    model = tiny_mixture(family, torch.float64)
    result = control(model, PROMPT, TARGET, probability=0.3, basis="hidden")
    rows, added = result.neurons(0)
    assert rows[:, 2].min() >= 0
    own = model.feed_forward.layer_neurons[0]
    shift = np.zeros((3, own.n_experts, own.n_of_expert))
    shift[rows[:, 0], rows[:, 2], rows[:, 1]] = added
    handles = []
    modules = [part for part in model.model.modules() if type(part).__name__.endswith("Experts")]
    for layer, experts in enumerate(modules):

        def add(module: Any, inputs: Any, output: Tensor, layer: int = layer) -> Tensor:
            _, expert_tk, weight_tk = inputs
            by_expert = torch.einsum("xhn,xn->xh", module.down_proj, torch.from_numpy(shift[layer]))
            added_th = (weight_tk[..., None] * by_expert[expert_tk]).sum(1)
            changed = output.clone()
            changed[places_of(at)] += added_th[places_of(at)]
            return changed

        handles.append(experts.register_forward_hook(add))
    after = written_by_hand(model.model, IDS)
    for handle in handles:
        handle.remove()
    before = written_by_hand(model.model, IDS)
    assert before != after
    implementation = model.model.config._experts_implementation
    assert generate(model, PROMPT, result, n_tokens=N, at=at) == Generated(text(before), text(after))
    assert model.model.config._experts_implementation == implementation


def test_a_shift_is_tried_in_another_prompt() -> None:
    model, result = model_of("Llama 2"), steered("Llama 2", "gate")
    other = (30, 11, 52)
    before = written_by_hand(model.model, other)
    with shifted_by_hand(model.model, result, "gate", places_of("readout", 3)):
        after = written_by_hand(model.model, other)
    assert before != after
    assert generate(model, "w30 w11 w52", result, n_tokens=N) == Generated(text(before), text(after))


def test_a_shift_of_zero_changes_nothing() -> None:
    model = model_of("Llama 2")
    result = control(model, PROMPT, TARGET, probability=float(steered("Llama 2").probability_before[0]))
    assert not result.shift.any()
    found = generate(model, PROMPT, result, n_tokens=N)
    assert found.before == found.after == text(written_by_hand(model.model, IDS))


def test_settings_of_a_checkpoint_do_not_count() -> None:
    model, result = model_of("Llama 2"), steered("Llama 2")
    expected = generate(model, PROMPT, result, n_tokens=N)
    before = model.model.generation_config
    own = GenerationConfig(
        do_sample=True, temperature=3.0, top_k=5, repetition_penalty=9.0, no_repeat_ngram_size=1, max_length=7,
        num_beams=2, suppress_tokens=[9],
    )  # fmt: skip
    model.model.generation_config = own
    try:
        assert generate(model, PROMPT, result, n_tokens=N) == expected
        assert model.model.generation_config is own
    finally:
        model.model.generation_config = before


def test_text_ends_where_the_model_ends_it() -> None:
    model = tiny_model("Llama 2", torch.float64)
    result = steered("Llama 2")
    written = written_by_hand(model.model, IDS, 12)
    place = next(i for i in range(3, 12) if written[i] not in written[:i])
    model.model.generation_config.eos_token_id = [1, written[place]]
    found = generate(model, PROMPT, result, n_tokens=12).before
    assert found == text(written[: place + 1])


def test_special_tokens_are_no_text() -> None:
    model = tiny_model("Llama 2", torch.float64)
    own = LanguageModel(model.model, words_of_tiny_models("<s> $A"), name="words")
    result = control(own, PROMPT, TARGET, probability=0.4)
    expected = written_by_hand(model.model, (1, *IDS))
    assert not {1, 2} & set(expected)
    assert generate(own, PROMPT, result, n_tokens=N).before == text(expected)
    model.model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.model.lm_head.weight[2] = 3 * model.model.lm_head.weight[expected[2]]
    assert 2 in written_by_hand(model.model, (1, *IDS))
    assert "s>" not in generate(own, PROMPT, result, n_tokens=N).before


def test_conversations_are_prompts() -> None:
    model = tiny_model("Llama 2", torch.float64)
    template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}w7"
    model.tokenizer.chat_template = template
    messages = [{"role": "user", "content": "w5 w41"}]
    # The role is no word of its vocabulary, which is w0.
    ids = (0, 5, 41, 7)
    result = control(model, [messages], [[" w9"]], probability=0.4)
    assert generate(model, messages, result, n_tokens=N) == generate(model, "user w5 w41 w7", result, n_tokens=N)
    assert generate(model, messages, result, n_tokens=N).before == text(written_by_hand(model.model, ids))


@pytest.mark.parametrize("at", AT)
def test_hooks_are_gone_after_an_error(at: str, tmp_path: Any) -> None:
    model, result = model_of("Llama 2"), steered("Llama 2")
    exported = load_shift(export_shift(model, result, 0, tmp_path / "shift"))
    settings, projection = model.model.generation_config, model.model.model.layers[0].mlp.up_proj
    passes: list[None] = []

    def fail(*_: Any) -> None:
        passes.append(None)
        # In the second pass of the text with the shift.
        if len(passes) == N + 2:
            assert hooks_of(model.model) > 1 or projection.bias is not None
            raise RuntimeError("stop")

    for shift in (result, exported):
        passes.clear()
        handle = model.model.lm_head.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            generate(model, PROMPT, shift, n_tokens=N, at=at)
        handle.remove()
        assert hooks_of(model.model) == 0
        assert projection.bias is None
        assert model.model.generation_config is settings


def _of(family: str) -> Callable[[], LanguageModel]:
    return lambda: model_of(family)


@pytest.mark.parametrize(
    ("make", "options", "kind", "setting", "says"),
    [
        (lambda: tiny_model("BERT"), {}, ModelError, "model", "BERT is a masked model, which generates no text"),
        (_of("Llama 2"), {"n_tokens": 0}, ConfigurationError, "n_tokens", "at least 1"),
        (_of("Llama 2"), {"n_tokens": 2.0}, ConfigurationError, "n_tokens", "at least 1"),
        (_of("Llama 2"), {"n_tokens": 60}, ConfigurationError, "n_tokens", "holds 64 tokens, the prompt has 5"),
        (_of("Llama 2"), {"at": "each"}, ConfigurationError, "at", "one of readout, all"),
        (_of("Llama 2"), {"index": 1}, ConfigurationError, "index", "from 0 to 0"),
        (_of("Llama 2"), {"index": -1}, ConfigurationError, "index", "from 0 to 0"),
        (_of("Llama 2"), {"prompt": ""}, ConfigurationError, "prompt", "a text, or a list of messages"),
        (_of("Llama 2"), {"prompt": [{"role": "user"}]}, PromptError, "prompt", "has no content"),
        (_of("BLOOM"), {}, ConfigurationError, "result", "the model that it was made with"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    make: Callable[[], LanguageModel], options: dict[str, Any], kind: Any, setting: str, says: str
) -> None:
    result = steered("Llama 2") if make().name != "BLOOM" else _deep()
    given = {"prompt": PROMPT, "index": 0, **options}
    with refused(kind, setting, says=says) as caught:
        generate(make(), given.pop("prompt"), result, **given)
    assert "\n" not in str(caught.value)


def _deep() -> ControlResult:
    return control(tiny_model("Nemotron-H"), PROMPT, TARGET, probability=0.05, neurons=[5])


def test_an_exported_shift_is_one(tmp_path: Any) -> None:
    place = export_shift(model_of("Llama 2"), steered("Llama 2"), 0, tmp_path / "shift")
    with refused(ConfigurationError, "index", 1, "from 0 to 0"):
        generate(model_of("Llama 2"), PROMPT, load_shift(place), 1)


@pytest.mark.faults
@pytest.mark.model
@pytest.mark.parametrize("at", AT)
def test_the_default_model_writes_what_whole_passes_give(smollm2: LanguageModel, at: str) -> None:
    prompt, target = "The capital of France is", " Rome"
    result = control(smollm2, prompt, target, top=True)
    ids = smollm2.tokenizer(prompt).input_ids
    texts = []
    for context in (nullcontext(), shifted_by_hand(smollm2.model, result, "paper", places_of(at, len(ids)))):
        with context:
            texts.append(smollm2.tokenizer.decode(written_by_hand(smollm2.model, ids, 5)))
    found = generate(smollm2, prompt, result, n_tokens=5, at=at)
    assert found == Generated(*texts)
    if at == "readout":
        assert found.after.startswith(" Rome")
        assert not found.before.startswith(" Rome")


@pytest.mark.model
def test_the_default_model_goes_on_with_a_conversation(smollm2: LanguageModel) -> None:
    messages = [{"role": "user", "content": "What is the capital of France? One word."}]
    result = neg_service.control(smollm2, [messages], [["Rome"]], top=True)
    found = generate(smollm2, messages, result, n_tokens=4)
    ids = smollm2.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    expected = smollm2.tokenizer.decode(written_by_hand(smollm2.model, ids, 4), skip_special_tokens=True)
    assert found.before == expected
    assert found.after.startswith("Rome")
