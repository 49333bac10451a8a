"""Small real models on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from neg_service.models.repeated_layers import as_loaded
from tests.tiny_models import tiny_model, tiny_tokenizer


def save_tiny_model(directory: Path, change: Callable[[torch.nn.Module], None] = lambda model: None) -> Path:
    """A tiny Llama with its tokenizer, as a directory that `model.source` can name."""
    model = tiny_model("Llama 2").model
    change(model)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def save_family(family: str, directory: Path) -> Path:
    """A family's tiny model as transformers saves it, made once; each test has files of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in _files_of(family).items():
        (directory / name).write_bytes(content)
    return directory


@functools.cache
def _files_of(family: str) -> dict[str, bytes]:
    with TemporaryDirectory() as place:
        model = tiny_model(family).model
        with as_loaded(model):
            model.save_pretrained(place)
        tiny_tokenizer().save_pretrained(place)
        return {path.name: path.read_bytes() for path in Path(place).iterdir()}
