"""The zoo's silent faults of files and prompts, which the loader has to see; those of passes are in `test_zoo.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor

import neg_service
from neg_service.errors import ModelError
from neg_service.prompts.prompt import Prompt
from neg_service.prompts.tokens import encode
from tests.tiny_models import tiny_tokenizer


def saved(directory: Path, **options: Any) -> Path:
    config = hf.LlamaConfig(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, **options
    )
    hf.LlamaForCausalLM(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def rewritten(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def reconfigured(directory: Path, **options: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def missing_bias(directory: Path) -> None:
    rewritten(saved(directory, attention_bias=True), lambda own: [x.add_(1) for n, x in own.items() if "bias" in n])
    reconfigured(directory, attention_bias=False)


def weights_that_were_not_loaded(directory: Path) -> None:
    rewritten(saved(directory), lambda own: own.pop("model.layers.1.mlp.up_proj.weight"))


def untied_head(directory: Path) -> None:
    saved(directory, tie_word_embeddings=False)
    rewritten(directory, lambda own: own.pop("lm_head.weight"))


def adapter(directory: Path) -> None:
    rewritten(
        saved(directory),
        lambda own: own.update({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 24)}),
    )


def layers_that_are_left_out(directory: Path) -> None:
    saved(directory)
    reconfigured(directory, num_hidden_layers=1)


def weights_of_other_sizes(directory: Path) -> None:
    saved(directory)
    reconfigured(directory, intermediate_size=44)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (missing_bias, "self_attn.k_proj.bias"),
        (weights_that_were_not_loaded, "model.layers.1.mlp.up_proj.weight"),
        (untied_head, "lm_head.weight"),
        (adapter, "adapter"),
        (layers_that_are_left_out, "model.layers.1."),
        (weights_of_other_sizes, "mismatched"),
    ],
)
def test_a_fault_of_files_is_seen(spoil: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    spoil(tmp_path)
    with pytest.raises(ModelError, match=says):
        neg_service.load_model(str(tmp_path), device="cpu")


def test_a_doubled_first_token_is_seen() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "w1"})
    first = TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    tokenizer.backend_tokenizer.post_processor = first
    spelled, plain = encode(tokenizer, [Prompt("0", "w1 w2 w3", (" w7",)), Prompt("1", "w2 w3", (" w7",))], None)
    assert spelled.ids == plain.ids == (1, 2, 3)
