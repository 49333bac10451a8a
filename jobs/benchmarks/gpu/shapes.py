"""Shapes of models, from their published configurations, and how one is made on a device, with random weights."""

from __future__ import annotations

from typing import Any

# The configuration's class in transformers, and its sizes.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "LlamaConfig",
        {
            "vocab_size": 500,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
        },
    ),
    "tiny-mixture": (
        "OlmoeConfig",
        {
            "vocab_size": 500,
            "hidden_size": 48,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 2048,
        },
    ),
    "smollm2-135m": (
        "LlamaConfig",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.2-3b": (
        "LlamaConfig",
        {
            "vocab_size": 128256,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "olmoe-1b-7b": (
        "OlmoeConfig",
        {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "max_position_embeddings": 4096,
        },
    ),
    "llama-3.1-8b": (
        "LlamaConfig",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
        },
    ),
}


def random_model(shape: str, device: Any, dtype: Any) -> Any:
    """A `LanguageModel` of a shape, made on `device` in `dtype`: no memory of the host, and no file, is used.

    Weights are normal, with one over the root of the inputs as their deviation, so that neurons matter.
    """
    # Here and not above: the process that starts the others has no torch.
    import torch
    import transformers

    from neg_service.models.language_model import LanguageModel

    name, sizes = SHAPES[shape]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**sizes, bos_token_id=1, eos_token_id=2)
    with torch.device(device):
        module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return LanguageModel(module, name=f"random {shape}")
