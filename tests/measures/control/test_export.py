"""Exported shifts: added by hand to a model that the library alone loads, they do what `control` says it achieved."""

from __future__ import annotations

import functools
import json
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import neg_service
from neg_service import ControlResult, LanguageModel, control, export_shift, load_shift
from neg_service.errors import ConfigurationError, DestinationError, ModelError, PromptError
from neg_service.models.source import fetch
from tests import oracle
from tests.configurations import tiny
from tests.mixtures import tiny_mixture
from tests.refusals import NOT_GIVEN, refused
from tests.tiny_models import tiny_model, tiny_tokenizer

IDS = (5, 41, 7, 60, 8)
PROMPT, TARGET = " ".join(f"w{i}" for i in IDS), " w9"
OTHER = (30, 11, 52)


@functools.cache
def model_of(family: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """A tiny model, made once."""
    if family in ("bitnet", "zamba2"):
        return LanguageModel(tiny(family, is_masked=False).to(dtype), tiny_tokenizer(), name=family)
    return tiny_model(family, dtype)


@functools.cache
def steered(family: str, basis: str = "paper", dtype: torch.dtype = torch.float64) -> ControlResult:
    """What `control` found for the prompt; only some layers of it are shifted, so that one is left alone."""
    layers = [1, 3] if family == "zamba2" else [0, 2]
    return control(model_of(family, dtype), PROMPT, TARGET, probability=0.4, basis=basis, neurons=layers)


def exported(place: Path, family: str, form: str, basis: str = "paper", dtype: torch.dtype = torch.float64) -> Path:
    """The folder of the shift of the prompt."""
    own = {"prompt": PROMPT, "target": TARGET}
    return export_shift(model_of(family, dtype), steered(family, basis, dtype), 0, place / "shift", form=form, **own)


def reloaded(family: str, place: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The tiny model's weights in the library's own class, read from files."""
    own = model_of(family, dtype).model
    own.save_pretrained(place / "model")
    attention = own.config._attn_implementation
    return AutoModelForCausalLM.from_pretrained(place / "model", dtype=dtype, attn_implementation=attention).eval()


@torch.no_grad()
def logits(model: Any, ids: Sequence[int] = IDS) -> Tensor:
    """Of all positions [T, V], by a plain pass over the whole prompt."""
    found: Tensor = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    return found


def probability(model: Any, target: int = 9, ids: Sequence[int] = IDS) -> float:
    """Of a token behind the prompt."""
    return float(logits(model, ids)[-1].double().softmax(-1)[target])


@contextmanager
def added_by_hand(modules: Sequence[tuple[nn.Module, Tensor]], places: slice = slice(-1, None)) -> Iterator[None]:
    """Constants added to what modules give, at some positions of prompts that run alone."""
    handles = []
    for module, constant in modules:

        def add(_module: nn.Module, _inputs: Any, output: Tensor, constant: Tensor = constant) -> Tensor:
            changed = output.clone()
            changed.view(-1, output.shape[-1])[places] += constant.to(output.dtype)
            return changed

        handles.append(module.register_forward_hook(add))
    yield
    for handle in handles:
        handle.remove()


def hooks_of(model: nn.Module) -> int:
    """How many hooks there are in a model."""
    return sum(len(own._forward_hooks) + len(own._forward_pre_hooks) for own in model.modules())


CASES = [
    ("Llama 2", "bias", "paper", torch.float32),
    ("Llama 2", "bias", "paper", torch.float64),
    ("Phi-3 and 4", "bias", "paper", torch.float32),
    # To what its up projection gives another module's output is added.
    ("zamba2", "bias", "paper", torch.float64),
    ("Llama 2", "vector", "paper", torch.float32),
    ("Llama 2", "vector", "paper", torch.float64),
    ("Llama 2", "vector", "hidden", torch.float64),
    ("Gemma 2", "vector", "gate", torch.float64),
    ("GPT-2", "vector", "paper", torch.float32),
    ("OPT", "vector", "paper", torch.float64),
    # A norm stands before its down projection.
    ("bitnet", "vector", "hidden", torch.float64),
]


@pytest.mark.parametrize(("family", "form", "basis", "dtype"), CASES)
def test_a_plain_model_with_it_meets_what_was_achieved(
    family: str, form: str, basis: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    result = steered(family, basis, dtype)
    assert result.achieved[0] > 3 * result.probability_before[0]
    place = exported(tmp_path, family, form, basis, dtype)
    tensors, about = load_file(place / "shift.safetensors"), json.loads((place / "shift.json").read_text())
    assert {own.dtype for own in tensors.values()} == {dtype}
    plain = reloaded(family, tmp_path, dtype)
    assert probability(plain) == pytest.approx(result.probability_before[0], abs=1e-6)
    parts = [(plain.get_submodule(own["module"]), tensors[own["tensor"]]) for own in about["tensors"]]
    with added_by_hand(parts):
        assert probability(plain) == pytest.approx(result.achieved[0], abs=1e-5)
    with load_shift(place).applied(plain):
        assert probability(plain) == pytest.approx(result.achieved[0], abs=1e-5)
    assert about["plain_pass"]["probability"] == pytest.approx(result.achieved[0], abs=1e-5)


@pytest.mark.model
@pytest.mark.parametrize(("form", "basis"), [("bias", "paper"), ("vector", "paper")])
def test_the_default_model_with_it_meets_what_was_achieved(
    smollm2: LanguageModel, form: str, basis: str, tmp_path: Path
) -> None:
    prompt, target = "The capital of France is", " Rome"
    result = control(smollm2, prompt, target, probability=0.6, basis=basis)
    place = export_shift(smollm2, result, 0, tmp_path / "shift", form=form, prompt=prompt, target=target)
    plain = AutoModelForCausalLM.from_pretrained(fetch("smollm2").directory, dtype=torch.float32).eval()
    ids = smollm2.tokenizer(prompt).input_ids
    token = smollm2.tokenizer(target, add_special_tokens=False).input_ids[0]
    assert probability(plain, token, ids) == pytest.approx(result.probability_before[0], abs=1e-5)
    with load_shift(place).applied(plain):
        assert probability(plain, token, ids) == pytest.approx(result.achieved[0], abs=1e-5)


@pytest.mark.parametrize(("family", "start"), [("Llama 2", 0), ("Phi-3 and 4", 40)])
def test_a_bias_holds_the_shift_itself_and_nothing_beside(family: str, start: int, tmp_path: Path) -> None:
    tensors = load_file(exported(tmp_path, family, "bias") / "shift.safetensors")
    kind = "gate_up_proj" if start else "up_proj"
    assert set(tensors) == {f"model.layers.{layer}.mlp.{kind}.bias" for layer in (0, 2)}
    result = steered(family)
    for place, layer in enumerate(result.layers):
        own = tensors[f"model.layers.{layer}.mlp.{kind}.bias"]
        # Of a fused projection the first half is the gate.
        assert not own[:start].any()
        assert np.array_equal(own[start:].numpy(), result.shift[0, place])


@pytest.mark.parametrize("family", ["Llama 2", "Phi-3 and 4"])
def test_at_all_positions_a_bias_is_the_parameter_of_the_projection(family: str, tmp_path: Path) -> None:
    place = exported(tmp_path, family, "bias")
    plain, by_hand = reloaded(family, tmp_path), reloaded(family, tmp_path)
    for name, own in load_file(place / "shift.safetensors").items():
        by_hand.get_submodule(name.removesuffix(".bias")).bias = nn.Parameter(own)
    before = logits(plain)
    with load_shift(place).applied(plain, at="all"):
        assert torch.equal(logits(plain), logits(by_hand))
        assert hooks_of(plain) == 0
    assert torch.equal(logits(plain), before)
    assert (logits(by_hand) - before)[0].abs().max() > 1e-3


def test_a_bias_is_added_to_the_one_that_is_there(tmp_path: Path) -> None:
    place = exported(tmp_path, "Llama 2", "bias")
    plain = reloaded("Llama 2", tmp_path)
    own = plain.model.layers[0].mlp.up_proj
    own.bias = nn.Parameter(torch.linspace(-1, 1, 40, dtype=torch.float64))
    before, tensors = own.bias, load_file(place / "shift.safetensors")
    modules = [(plain.get_submodule(name.removesuffix(".bias")), tensor) for name, tensor in tensors.items()]
    with added_by_hand(modules, slice(None)):
        expected = logits(plain)
    with load_shift(place).applied(plain, at="all"):
        torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-12)
    assert own.bias is before


def test_a_vector_at_all_positions_is_added_everywhere(tmp_path: Path) -> None:
    # OPT's MLPs see prompts and positions in one axis.
    place = exported(tmp_path, "OPT", "vector")
    plain, tensors = reloaded("OPT", tmp_path), load_file(place / "shift.safetensors")
    modules = [(plain.get_submodule(name.removesuffix(".output")), tensor) for name, tensor in tensors.items()]
    with added_by_hand(modules, slice(None)):
        expected = logits(plain)
    with load_shift(place).applied(plain, at="all"):
        torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-12)
        found = plain(torch.tensor([IDS, IDS]), use_cache=False).logits
    torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["Llama 2", "OPT"])
def test_each_prompt_of_a_batch_is_shifted_at_its_last_token(family: str, tmp_path: Path) -> None:
    place = exported(tmp_path, family, "vector")
    plain, shift = reloaded(family, tmp_path), load_shift(place)
    other = tuple(reversed(IDS))
    with shift.applied(plain):
        found = plain(torch.tensor([IDS, other]), use_cache=False).logits
        for row, ids in enumerate((IDS, other)):
            torch.testing.assert_close(found[row], logits(plain, ids), rtol=0, atol=1e-10)
    before = logits(plain)
    # Positions before the last one are as without it.
    torch.testing.assert_close(found[0, :-1], before[:-1], rtol=0, atol=1e-10)
    assert (found[0, -1] - before[-1]).abs().max() > 0.1


@pytest.mark.parametrize("family", ["Llama 2", "Qwen 3.5"])
@torch.no_grad()
def test_over_a_cache_the_prompts_last_token_alone_is_shifted(family: str, tmp_path: Path) -> None:
    shift = load_shift(exported(tmp_path, family, "bias"))
    plain = reloaded(family, tmp_path)
    parts = [(plain.get_submodule(own.module), shift.tensors[own.tensor]) for own in shift.parts]
    with added_by_hand(parts, slice(len(IDS) - 1, len(IDS))):
        expected = logits(plain, (*IDS, 12, 13))
    with shift.applied(plain):
        first = plain(torch.tensor([IDS]), use_cache=True)
        # The cache also by its place in the signature.
        second = plain(torch.tensor([[12]]), None, None, first.past_key_values)
        third = plain(input_ids=torch.tensor([[13]]), past_key_values=second.past_key_values)
        again = plain(torch.tensor([IDS]), use_cache=True)
    found = torch.cat([own.logits[0] for own in (first, second, third)])
    # Chunks of recurrent layers round in float32, whatever their model is in.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 if family == "Qwen 3.5" else 1e-10)
    torch.testing.assert_close(again.logits, first.logits)


def test_a_vector_of_what_down_reads_is_the_same_shift_in_every_prompt(tmp_path: Path) -> None:
    result = steered("Llama 2", "hidden")
    place = exported(tmp_path, "Llama 2", "vector", "hidden")
    plain = reloaded("Llama 2", tmp_path)
    handles = []
    for row, layer in enumerate(result.layers):
        module, side = oracle.neuron_module(plain.model.layers[layer].mlp, "hidden")
        assert side == "input"

        def shift(_module: nn.Module, inputs: tuple[Tensor, ...], row: int = row) -> tuple[Tensor]:
            moved = inputs[0].clone()
            moved[0, -1] += torch.from_numpy(result.shift[0, row])
            return (moved,)

        handles.append(module.register_forward_pre_hook(shift))
    expected = logits(plain, OTHER)
    for handle in handles:
        handle.remove()
    assert (expected - logits(plain, OTHER))[-1].abs().max() > 0.1
    with load_shift(place).applied(plain):
        torch.testing.assert_close(logits(plain, OTHER), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("family", "form", "basis", "exact_for"),
    [
        ("Llama 2", "bias", "paper", "every prompt"),
        ("Llama 2", "vector", "paper", "this prompt, at its last token"),
        ("Llama 2", "vector", "hidden", "every prompt"),
        ("Gemma 2", "vector", "gate", "this prompt, at its last token"),
        ("OPT", "vector", "paper", "every prompt"),
        ("bitnet", "vector", "hidden", "this prompt, at its last token"),
    ],
)
def test_it_says_for_which_prompts_it_is_exact(
    family: str, form: str, basis: str, exact_for: str, tmp_path: Path
) -> None:
    assert load_shift(exported(tmp_path, family, form, basis)).about["exact_for"] == exact_for


def test_mlps_that_are_always_on_beside_experts_have_a_bias(tmp_path: Path) -> None:
    model = tiny_mixture("Qwen 2 MoE", torch.float64)
    own = [(0, neuron, -1) for neuron in range(18)] + [(1, neuron, None) for neuron in range(20)]
    result = control(model, PROMPT, TARGET, probability=0.1, neurons=own)
    assert result.achieved[0] > 2 * result.probability_before[0]
    place = export_shift(model, result, 0, tmp_path / "shift", prompt=PROMPT, target=TARGET)
    tensors = load_file(place / "shift.safetensors")
    assert set(tensors) == {"model.layers.0.mlp.shared_expert.up_proj.bias", "model.layers.1.mlp.up_proj.bias"}
    parts = [(model.model.get_submodule(name.removesuffix(".bias")), own) for name, own in tensors.items()]
    with added_by_hand(parts):
        assert probability(model.model) == pytest.approx(result.achieved[0], abs=1e-5)


def test_layers_that_share_an_mlp_have_vectors_of_their_own(tmp_path: Path) -> None:
    plain = tiny_model("Llama 2", torch.float64).model
    plain.model.layers[2].mlp = plain.model.layers[0].mlp
    model = LanguageModel(plain, tiny_tokenizer(), name="shared")
    result = control(model, PROMPT, TARGET, probability=0.4)
    with refused(ConfigurationError, "form", "bias", "layer 0 shares its LlamaMLP"):
        export_shift(model, result, 0, tmp_path / "bias")
    place = export_shift(model, result, 0, tmp_path / "shift", form="vector", prompt=PROMPT)
    shift = load_shift(place)
    assert [own.within for own in shift.parts] == ["model.layers.0", None, "model.layers.2"]
    assert probability(plain) == pytest.approx(result.probability_before[0], abs=1e-10)
    with shift.applied(plain):
        assert probability(plain) == pytest.approx(result.achieved[0], abs=1e-10)
    assert hooks_of(plain) == 0


def test_the_text_says_what_it_is(tmp_path: Path) -> None:
    model, result = model_of("Llama 2"), steered("Llama 2")
    place = exported(tmp_path, "Llama 2", "bias")
    about, tensors = json.loads((place / "shift.json").read_text()), load_file(place / "shift.safetensors")
    assert about["model"] == {
        "name": "Llama 2", "identity": model.identity, "architecture": "LlamaForCausalLM", "dtype": "float64",
    }  # fmt: skip
    assert (about["form"], about["basis"], about["prompt"], about["target"]) == ("bias", "paper", PROMPT, TARGET)
    assert about["package"] == {"name": "neg-service", "version": neg_service.__version__}
    for name in ("wanted", "achieved", "probability_before", "norm", "relative_norm", "largest", "passes", "reason"):
        assert about[name] == getattr(result, name)[0], name
    assert about["reached"] is True
    assert about["n_neurons"] == np.count_nonzero(result.shift[0])
    assert about["side_effects"] is None
    assert [own["layer"] for own in about["tensors"]] == [0, 2]
    assert {own["tensor"]: own["norm"] for own in about["tensors"]} == {
        name: pytest.approx(float(own.norm())) for name, own in tensors.items()
    }
    assert sum(own["norm"] ** 2 for own in about["tensors"]) == pytest.approx(about["norm"] ** 2)


class _Measured:
    """Something with a table, as side effects are."""

    def table(self) -> pa.Table:
        return pa.table({"prompt": ["a", "b"], "kl": [0.5, float("nan")]})


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (_Measured(), [{"prompt": "a", "kl": 0.5}, {"prompt": "b", "kl": None}]),
        (_Measured().table(), [{"prompt": "a", "kl": 0.5}, {"prompt": "b", "kl": None}]),
        ({"kl": np.array([0.5, np.inf]), "n": np.int64(2), "held": ("a",)}, {"kl": [0.5, None], "n": 2, "held": ["a"]}),
    ],
)
def test_side_effects_are_written_beside(given: Any, written: Any, tmp_path: Path) -> None:
    place = export_shift(model_of("Llama 2"), steered("Llama 2"), 0, tmp_path / "shift", side_effects=given)
    assert load_shift(place).about["side_effects"] == written


@pytest.mark.parametrize(("form", "at"), [("bias", "readout"), ("bias", "all"), ("vector", "readout")])
def test_it_is_undone_to_the_bit_also_after_an_error(form: str, at: str, tmp_path: Path) -> None:
    shift = load_shift(exported(tmp_path, "Llama 2", form))
    plain = reloaded("Llama 2", tmp_path)
    before, names = logits(plain), [name for name, _ in plain.named_parameters()]
    for error in (None, RuntimeError("stop")):
        with pytest.raises(RuntimeError, match="stop") if error else nullcontext(), shift.applied(plain, at=at):
            assert not torch.equal(logits(plain), before)
            if error:
                raise error
        assert hooks_of(plain) == 0
        assert [name for name, _ in plain.named_parameters()] == names
        assert torch.equal(logits(plain), before)


def _masked() -> tuple[LanguageModel, ControlResult]:
    return tiny_model("BERT"), steered("Llama 2")


def _experts() -> tuple[LanguageModel, ControlResult]:
    model = tiny_mixture("Qwen 3 MoE", torch.float64)
    return model, control(model, PROMPT, TARGET, probability=0.05)


def _zero() -> tuple[LanguageModel, ControlResult]:
    model = model_of("Llama 2")
    p = float(steered("Llama 2").probability_before[0])
    return model, control(model, PROMPT, TARGET, probability=p)


def _of(family: str, basis: str = "paper") -> Callable[[], tuple[LanguageModel, ControlResult]]:
    return lambda: (model_of(family), steered(family, basis))


@pytest.mark.parametrize(
    ("make", "options", "kind", "setting", "says"),
    [
        (_of("Llama 2"), {"form": "patch"}, ConfigurationError, "form", "one of bias, vector"),
        (_of("Llama 2", "hidden"), {}, ConfigurationError, "form", "hidden are a product in LlamaMLP"),
        (_of("Gemma 2", "gate"), {}, ConfigurationError, "form", "behind an activation in Gemma2MLP"),
        (_of("OPT"), {}, ConfigurationError, "form", "behind an activation in OPTDecoderLayer"),
        (_masked, {}, ModelError, "model", "BERT is a masked model"),
        (_experts, {}, ConfigurationError, "index", "experts in layer 0.*router"),
        (_experts, {"form": "vector", "prompt": PROMPT}, ConfigurationError, "index", "experts in layer 0"),
        (_zero, {}, ConfigurationError, "index", "is zero"),
        (_of("Llama 2"), {"index": 1}, ConfigurationError, "index", "from 0 to 0"),
        (_of("Llama 2"), {"index": True}, ConfigurationError, "index", "from 0 to 0"),
        (_of("Llama 2"), {"form": "vector"}, ConfigurationError, "prompt", "form=vector"),
        (_of("Llama 2"), {"prompt": 3}, ConfigurationError, "prompt", "a text, or a list of messages"),
        (_of("Llama 2"), {"prompt": PROMPT, "target": ""}, ConfigurationError, "target", "a text"),
        (_of("Llama 2"), {"prompt": "w1 w2", "target": TARGET}, PromptError, "prompt", "target of that index"),
        (_of("Llama 2"), {"prompt": PROMPT, "target": " w10"}, PromptError, "prompt", "plain pass moves"),
        (_of("Llama 2"), {"side_effects": 0.5}, ConfigurationError, "side_effects", "a mapping"),
        (_of("Llama 2"), {"side_effects": {"a": object()}}, ConfigurationError, "side_effects", "numbers and texts"),
        (lambda: (model_of("GPT-2"), steered("Llama 2")), {"form": "vector", "prompt": PROMPT, "target": TARGET},
         PromptError, "prompt", "plain pass moves"),
        (lambda: (tiny_model("Falcon, ALiBi"), _deep()), {}, ConfigurationError, "result", "layer 5"),
        (_of("Llama 2"), {"place": ""}, DestinationError, "place", "a path"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_refused(
    make: Callable[[], tuple[LanguageModel, ControlResult]], options: dict[str, Any], kind: Any, setting: str,
    says: str, tmp_path: Path,
) -> None:  # fmt: skip
    model, result = make()
    given = {"index": 0, "place": tmp_path / "shift", **options}
    with refused(kind, setting, says=says) as caught:
        export_shift(model, result, **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "shift").exists()


def _deep() -> ControlResult:
    model = model_of("Nemotron-H")
    return control(model, PROMPT, TARGET, probability=0.05, neurons=[5])


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    own = (model_of("Llama 2"), steered("Llama 2"), 0)
    with refused(DestinationError, "place", says="holds note.txt"):
        export_shift(*own, tmp_path)
    with refused(DestinationError, "place", says="is a file"):
        export_shift(*own, tmp_path / "note.txt")
    with refused(DestinationError, "place", says="Not a directory"):
        export_shift(*own, tmp_path / "note.txt" / "shift")
    assert [own.name for own in tmp_path.iterdir()] == ["note.txt"]
    (tmp_path / "empty").mkdir()
    assert sorted(own.name for own in export_shift(*own, tmp_path / "empty").iterdir()) == [
        "shift.json", "shift.safetensors",
    ]  # fmt: skip


def test_where_a_disk_is_full_nothing_is_left(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for place in (tmp_path / "new", tmp_path / "empty"):
        if place.name == "empty":
            place.mkdir()
        # Longer files fail as on a full disk; the tensors fit, the text does not.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1100, before[1]))
        try:
            with refused(DestinationError, "place", says="cannot be written: File too large"):
                export_shift(model_of("Llama 2"), steered("Llama 2"), 0, place)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [own.name for own in tmp_path.rglob("*")] == ([] if place.name == "new" else ["empty"])


def test_folders_that_are_damaged_are_refused(tmp_path: Path) -> None:
    place = exported(tmp_path, "Llama 2", "bias")
    text, tensors = (place / "shift.json").read_text(), (place / "shift.safetensors").read_bytes()
    with refused(ConfigurationError, "place", says=r"no shift\.json"):
        load_shift(tmp_path)
    for other, says in (
        ("[]", "not of a shift in format 1"),
        (text.replace('"format": 1', '"format": 2'), "not of a shift in format 1"),
        (text.replace('"form": "bias"', '"form": "patch"'), "not of a shift"),
        (text.replace("layers.0.mlp.up_proj.bias", "layers.1.mlp.up_proj.bias"), "name different tensors"),
        (text.replace('"module"', '"modul"'), "is damaged"),
        (text[:-9], "JSON"),
    ):
        (place / "shift.json").write_text(other)
        with refused(ConfigurationError, "place", says=says):
            load_shift(place)
    (place / "shift.json").write_text(text)
    (place / "shift.safetensors").write_bytes(tensors[:-8] + bytes(8))
    with refused(ConfigurationError, "place", says="not the file that shift.json was written with"):
        load_shift(place)
    (place / "shift.safetensors").unlink()
    with refused(ConfigurationError, "place", says=r"no shift\.safetensors"):
        load_shift(place)


def test_models_that_it_does_not_belong_to_are_refused(tmp_path: Path) -> None:
    shift = load_shift(exported(tmp_path, "Llama 2", "bias"))
    plain = model_of("Llama 2").model
    with refused(ConfigurationError, "at", "some", allowed="one of readout, all"), shift.applied(plain, at="some"):
        pass
    with refused(ConfigurationError, "model", "LanguageModel"), shift.applied(model_of("Llama 2")):  # type: ignore[arg-type]
        pass
    with refused(ModelError, None, NOT_GIVEN, "OPTForCausalLM has no module"), shift.applied(model_of("OPT").model):
        pass
    wider = tiny_model("Llama 2").model
    wider.model.layers[2].mlp.up_proj = nn.Linear(24, 41, bias=False)
    for at in ("readout", "all"):
        with refused(ModelError, None, NOT_GIVEN, "gives 41 values, the shift has 40"), shift.applied(wider, at=at):
            pass
        assert wider.model.layers[0].mlp.up_proj.bias is None
        assert hooks_of(wider) == 0
    other = tiny_model("Llama 2", torch.float64).model
    other.model.layers[2].mlp.up_proj = nn.Sequential(other.model.layers[2].mlp.up_proj)
    with refused(ConfigurationError, "at", "all", "takes no bias"), shift.applied(other, at="all"):
        pass
    assert other.model.layers[0].mlp.up_proj.bias is None
    with shift.applied(other):
        assert probability(other) == pytest.approx(steered("Llama 2").achieved[0], abs=1e-5)
