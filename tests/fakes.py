"""Small real models, a tokenizer, and workers and measures that fail on purpose. No mocks of what is under test."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    DistilBertConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    RobertaConfig,
)

from neg_service.cluster.plan import Shard
from neg_service.cluster.replica import Ready
from neg_service.errors import ModelError, NonFiniteError
from neg_service.models.language_model import LanguageModel

VOCABULARY = 97
# Sizes that are all different, so that a mixed-up axis cannot pass.
_SIZES = {"vocab_size": VOCABULARY, "num_hidden_layers": 3, "max_position_embeddings": 64}
_GROUPED = {**_SIZES, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_GROUPED, **_TOKENS),
    "mistral, window 5": lambda: MistralConfig(**_GROUPED, **_TOKENS, sliding_window=5),
    "qwen3": lambda: Qwen3Config(**_GROUPED, **_TOKENS, head_dim=8),
    "gemma2, soft caps, mixed windows": lambda: Gemma2Config(
        **_GROUPED,
        **_TOKENS,
        head_dim=8,
        sliding_window=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=8,
    ),
    "phi3, fused": lambda: Phi3Config(**_GROUPED, **_TOKENS),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_layer=3,
        n_embd=24,
        n_inner=40,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt-neox": lambda: GPTNeoXConfig(
        **_SIZES, hidden_size=24, intermediate_size=40, num_attention_heads=4, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: OPTConfig(
        **_SIZES, **_TOKENS, hidden_size=24, ffn_dim=40, num_attention_heads=4, word_embed_proj_dim=24
    ),
}
MASKED: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: BertConfig(**_SIZES, hidden_size=24, intermediate_size=40, num_attention_heads=4, pad_token_id=0),
    "roberta": lambda: RobertaConfig(
        **_SIZES, hidden_size=24, intermediate_size=40, num_attention_heads=4, pad_token_id=0
    ),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=VOCABULARY, dim=24, hidden_dim=40, n_layers=3, n_heads=4, max_position_embeddings=64
    ),
}
MASK = VOCABULARY - 1
GATED = [name for name in FAMILIES if name not in ("gpt2", "gpt-neox", "opt")]


def tiny_model(family: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A randomly initialised model of a family, large enough weights that neurons matter."""
    torch.manual_seed(0)
    kinds = FAMILIES if family in FAMILIES else MASKED
    build = AutoModelForCausalLM if family in FAMILIES else AutoModelForMaskedLM
    model = build.from_config(kinds[family](), attn_implementation="sdpa" if "gemma2" not in family else "eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
    return LanguageModel(model.to(dtype), tiny_tokenizer(), name=family)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words `w0` to `w96`, one token each; the last is the mask token of masked models."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token=f"w{MASK}")


def save_tiny_model(directory: Path, change: Callable[[torch.nn.Module], None] = lambda model: None) -> Path:
    """A tiny Llama with its tokenizer, as a directory that `model.source` can name."""
    model = tiny_model("llama").model
    change(model)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@dataclass
class FaultyWorker:
    """A worker whose shards do as told: `fails`, `kills` and `hangs` name shards; `once` is a folder for marks.

    A fault named in `once` happens the first time only, over all replicas.
    """

    fails: frozenset[int] = frozenset()
    not_finite: frozenset[int] = frozenset()
    kills: frozenset[int] = frozenset()
    hangs: frozenset[int] = frozenset()
    start_error: str = ""
    once: str = ""
    seconds: float = 0.0

    def __call__(self) -> FaultyWorker:
        """As a factory, it makes itself."""
        return self

    def start(self) -> Ready:
        """Ready at once, or never."""
        if self.start_error == "kill":
            os.kill(os.getpid(), 9)
        if self.start_error:
            raise ModelError(self.start_error)
        return Ready("nothing")

    def compute(self, shard: Shard, batch_scale: float) -> dict[str, pa.Table]:
        """Do what the shard's number asks for."""
        time.sleep(self.seconds)
        if shard.index in self.not_finite:
            raise NonFiniteError(f"prompt of shard {shard.index}: NaN")
        if shard.index in self.fails and self._is_due(shard.index):
            raise OSError(f"shard {shard.index} fails")
        if shard.index in self.hangs and self._is_due(shard.index):
            time.sleep(600)
        if shard.index in self.kills and self._is_due(shard.index):
            os.kill(os.getpid(), 9)
        return {"rows": pa.table({"shard": [shard.index], "batch_scale": [batch_scale]})}

    def _is_due(self, shard: int) -> bool:
        if not self.once:
            return True
        mark = Path(self.once) / f"shard-{shard}"
        if mark.exists():
            return False
        mark.touch()
        return True
