"""Exported shifts: added by hand to a model that the library alone loads, they do what `control` says it achieved."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
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
from tests.measures.control.exports import (
    PROMPT,
    TARGET,
    added_by_hand,
    exported,
    hooks_of,
    logits,
    model_of,
    probability,
    reloaded,
    steered,
)
from tests.mixtures import tiny_mixture
from tests.refusals import refused
from tests.tiny_models import tiny_model, tiny_tokenizer

OTHER = (30, 11, 52)
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


@pytest.mark.faults
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


def _masked() -> tuple[LanguageModel, ControlResult]:
    return tiny_model("BERT"), steered("Llama 2")


def _runs_again() -> tuple[LanguageModel, ControlResult]:
    model = tiny_model("HRM")
    return model, control(model, PROMPT, TARGET, probability=0.05)


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
        (_runs_again, {}, ModelError, "model", "HRM runs one layer's weights as several.* in all of its runs"),
        (_experts, {}, ConfigurationError, "index", "experts in layer 0.*router"),
        (_experts, {"form": "vector", "prompt": PROMPT}, ConfigurationError, "index", "experts in layer 0"),
        (_zero, {}, ConfigurationError, "index", "is zero"),
        (_of("Llama 2"), {"index": 1}, ConfigurationError, "index", "from 0 to 0"),
        (_of("Llama 2"), {"index": True}, ConfigurationError, "index", "from 0 to 0"),
        (_of("Llama 2"), {"form": "vector"}, ConfigurationError, "prompt", "form=vector"),
        (_of("Llama 2"), {"target": TARGET}, ConfigurationError, "target", "together with its prompt"),
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
