"""Tiny models as folders, changed so that they are another's or damaged, and the one line that refuses them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import neg_service
from neg_service.errors import NegServiceError
from neg_service.models.inspection import inspect_model
from neg_service.models.source import fetch
from tests.fakes import save_family

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def saved(family: str, directory: Path, **config: Any) -> Path:
    """A family's tiny model as a folder, with values of its configuration exchanged."""
    save_family(family, directory)
    change_config(directory, **config)
    return directory


def change_config(directory: Path, **config: Any) -> None:
    """Exchange values of its configuration."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Store the weights again, after `change` did something to them."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


# What a notebook calls the settings of a model.
_PARAMETERS = {
    f"model.{name}": name
    for name in ("source", "revision", "dtype", "device", "trust_remote_code", "engine", "products")
}


def refusal_of(directory: Path) -> str:
    """The one line that says why a folder is not loaded; planning says the same before, by the names of settings."""
    with pytest.raises(NegServiceError) as loading:
        neg_service.load_model(str(directory))
    with pytest.raises(NegServiceError) as planning:
        inspect_model(fetch(str(directory)), check_files=True)
    assert str(loading.value) == str(planning.value.renamed(_PARAMETERS))
    assert "\n" not in str(planning.value)
    return str(planning.value)
