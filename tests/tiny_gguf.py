"""The beginning of a .gguf file of a tiny model: its sizes, and a tokenizer of one word a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

from tests.tiny_models import VOCABULARY


def writer_of(file: Path, architecture: str, config: Any) -> gguf.GGUFWriter:
    """A writer that has been given these; further keys and tensors are the test's own."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(f"w{i}" for i in range(VOCABULARY - 2)), "w", "1"])
    writer.add_token_merges(["w 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return writer


def closed(writer: gguf.GGUFWriter) -> None:
    """Write what the writer was given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
