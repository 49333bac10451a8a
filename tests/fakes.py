"""A small real model on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tests.tiny_models import tiny_model, tiny_tokenizer


def save_tiny_model(directory: Path, change: Callable[[torch.nn.Module], None] = lambda model: None) -> Path:
    """A tiny Llama with its tokenizer, as a directory that `model.source` can name."""
    model = tiny_model("Llama 2").model
    change(model)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
