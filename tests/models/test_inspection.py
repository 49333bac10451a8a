"""What a configuration alone tells of a model: whether it can be measured, and where it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as hf

import neg_service
from neg_service import LanguageModel
from neg_service.errors import ModelError
from neg_service.layer_neurons import LayerNeurons
from neg_service.models.inspection import inspect_model
from neg_service.models.source import fetch
from tests.refusals import ANY, refused
from tests.tiny_models import tiny_model, tiny_tokenizer

TINY = {"vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "refusal"),
    [
        (
            # Its experts lie in embeddings, beside an MLP of a make that is known.
            hf.DogeConfig(**TINY, intermediate_size=40, is_moe=True, keep_window_size=0),
            ("model.source", ANY, r"the experts of layer 0 of DogeForCausalLM \(DogeCDMoE\) are not known"),
        ),
        (
            hf.T5Config(vocab_size=97, d_model=24, num_layers=2, num_heads=2),
            ("model.source", ANY, r"\(t5\) is an encoder-decoder"),
        ),
        (hf.BartConfig(vocab_size=97, d_model=24), ("model.source", ANY, r"\(bart\) is an encoder-decoder")),
        (
            hf.MambaConfig(vocab_size=97, hidden_size=24, num_hidden_layers=2),
            ("model.source", ANY, "MambaForCausalLM has no feed-forward layers: choose"),
        ),
        (
            hf.RwkvConfig(vocab_size=97, hidden_size=24, num_hidden_layers=2),
            ("model.source", ANY, "RwkvForCausalLM has no feed-forward layers: its channel mixing"),
        ),
        (
            hf.MobileBertConfig(vocab_size=97, num_hidden_layers=2),
            ("model.source", ANY, "MobileBertForMaskedLM multiplies by the weight of its vocabulary head"),
        ),
        (hf.ViTConfig(), ("model.source", ANY, r"\(vit\) is neither a causal nor a masked language model")),
        (
            hf.LlamaConfig(**TINY, quantization_config={"quant_method": "quanto", "weights": "int4"}),
            ("model.source", ANY, r"has quantised weights \(quanto\), which cannot be dequantised: this method is not"),
        ),
        (
            hf.LlamaConfig(**TINY, quantization_config={"quant_method": "gptq", "bits": 3}),
            ("model.source", ANY, r"has quantised weights \(gptq\), .*: its 3 bits are packed otherwise"),
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name_before_weights_are_read(
    config: hf.PreTrainedConfig, refusal: tuple[Any, ...], tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with refused(ModelError, *refusal):
        inspect_model(fetch(str(tmp_path)))
    with pytest.raises(ModelError):
        neg_service.load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            hf.MixtralConfig(**TINY, num_local_experts=3, intermediate_size=40, num_experts_per_tok=2),
            [LayerNeurons(0, n_experts=3, n_of_expert=40, n_chosen=2)] * 2,
        ),
        # A first layer without experts; behind it two MLPs of 8 that every token uses, as one, beside the experts.
        (
            hf.DeepseekV3Config(
                **TINY,
                first_k_dense_replace=1,
                intermediate_size=40,
                moe_intermediate_size=8,
                n_routed_experts=4,
                num_experts_per_tok=1,
                n_shared_experts=2,
                n_group=2,
                topk_group=1,
            ),
            [LayerNeurons(40), LayerNeurons(16, n_experts=4, n_of_expert=8, n_chosen=1)],
        ),
    ],
    ids=["Mixtral", "DeepseekV3"],
)
def test_a_configuration_alone_tells_what_neurons_layers_with_experts_have(
    config: hf.PreTrainedConfig, expected: list[LayerNeurons], tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    info = inspect_model(fetch(str(tmp_path)))
    assert list(info.layer_neurons) == expected
    assert info.has_experts
    assert info.neurons_by_layer == tuple(own.total for own in expected)
    # The most of all layers.
    assert info.n_neurons == max(own.n_slots for own in expected)


def test_a_masked_checkpoint_that_does_not_say_so_is_one(tmp_path: Path) -> None:
    for config in (hf.DebertaV2Config(**TINY), hf.BertConfig(**TINY), hf.ModernBertConfig(**TINY, pad_token_id=0)):
        config.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"")
        assert inspect_model(fetch(str(tmp_path))).is_masked


def test_a_mask_token_that_a_model_does_not_have_is_refused() -> None:
    config = tiny_model("BERT").model.config
    own = hf.BertForMaskedLM(type(config)(**{**config.to_dict(), "vocab_size": 50}))
    with refused(
        ModelError, "model.source", says=r"small: the mask token 'w96' has the id 96, .* below 50: .*model\.source"
    ):
        LanguageModel(own, tiny_tokenizer(), name="small")
