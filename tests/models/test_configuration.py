"""A configuration whose values cannot be ends in one line that names the key, or means what transformers says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from neg_service.errors import ModelError, NegServiceError
from neg_service.models.inspection import inspect_model
from neg_service.models.loading import load_model
from neg_service.models.source import fetch
from tests.fakes import save_family
from tests.families import model_of
from tests.refusals import refused

HUGE = 10**12


def folder_of(family: str, directory: Path) -> dict[str, Any]:
    """A family's tiny model on disk; its configuration as it was written."""
    config: dict[str, Any] = json.loads((save_family(family, directory) / "config.json").read_text())
    return config


def refusal(directory: Path, config: dict[str, Any]) -> str | None:
    """Why a model is not planned with another configuration; None if it is."""
    (directory / "config.json").write_text(json.dumps(config))
    text = None
    try:
        inspect_model(fetch(str(directory)), check_files=True)
    except NegServiceError as error:
        text = str(error)
    assert "\n" not in (text or "")
    return text


# Keys, values, and what the refusal says of them.
REFUSED: list[tuple[str, str, Any, str]] = [
    ("Llama 2", "max_position_embeddings", None, "max_position_embeddings=null: expected int"),
    ("Llama 2", "tie_word_embeddings", None, "tie_word_embeddings=null: expected bool"),
    ("Llama 2", "max_position_embeddings", "64", 'max_position_embeddings="64": expected int'),
    ("Llama 2", "max_position_embeddings", [64], "max_position_embeddings=[64]: expected int"),
    ("Llama 2", "max_position_embeddings", -1, "max_position_embeddings=-1: must be at least 1"),
    ("Llama 2", "max_position_embeddings", 0, "max_position_embeddings=0: must be at least 1"),
    ("Llama 2", "max_position_embeddings", math.inf, "max_position_embeddings=Infinity: must be a finite number"),
    ("Llama 2", "hidden_size", "24", 'hidden_size="24": expected int'),
    ("Llama 2", "num_hidden_layers", HUGE, f"num_hidden_layers={HUGE}: must be from 1 to 10000"),
    ("Llama 2", "num_hidden_layers", 0, "num_hidden_layers=0: must be from 1 to 10000"),
    ("Llama 2", "num_hidden_layers", -3, "num_hidden_layers=-3: must be from 1 to 10000"),
    ("Llama 2", "num_attention_heads", 0, "num_attention_heads=0: must be at least 1"),
    ("Llama 2", "num_key_value_heads", 0, "num_key_value_heads=0: must be at least 1"),
    ("Llama 2", "head_dim", 0, "head_dim=0: must be at least 1"),
    ("Llama 2", "rms_norm_eps", "1e-5", 'rms_norm_eps="1e-5": expected float'),
    ("Llama 2", "rms_norm_eps", math.nan, "rms_norm_eps=NaN: must be a finite number"),
    ("Llama 2", "rms_norm_eps", -1.0, "rms_norm_eps=-1.0: must be 0 or more"),
    ("Llama 2", "hidden_act", "swiglu", 'hidden_act="swiglu": is no activation that is known; did you mean'),
    ("GPT-2", "activation_function", "gelu_newest", 'activation_function="gelu_newest": is no activation'),
    ("DistilBERT", "activation", "x", 'activation="x": is no activation that is known'),
    ("Llama 2", "rope_parameters", {"rope_type": "spiral", "rope_theta": 1e4}, 'rope_type="spiral": is no kind of'),
    ("Llama 2", "rope_scaling", {"type": "spiral", "factor": 2.0}, 'rope_scaling.type="spiral": is no kind of'),
    ("Llama 2", "rope_scaling", {"rope_type": 3}, "rope_scaling.rope_type=3: is no kind of"),
    ("Llama 2", "rope_parameters", {"rope_type": "default", "rope_theta": math.inf}, "rope_theta=Infinity: must be"),
    ("Llama 2", "rope_parameters", {"rope_type": "default", "rope_theta": -1}, "rope_theta=-1: must be more than 0"),
    ("Llama 2", "rope_scaling", {"type": "linear", "factor": 0}, "rope_scaling.factor=0: must be more than 0"),
    ("Llama 2", "rope_scaling", {"rope_type": "linear", "factor": -2.0}, "factor=-2.0: must be more than 0"),
    ("Llama 2", "rope_scaling", {"factor": 4.0}, "rope_scaling.factor=4.0: would not be used, for rope_scaling has no"),
    ("Llama 2", "rope_scaling", {"kind": "linear", "factor": 4.0}, 'rope_scaling.kind="linear": would not be used'),
    ("Llama 2", "rope_parameters", {"factor": 4.0, "rope_theta": 1e4}, "rope_parameters.factor=4.0: would not be used"),
    (
        "Llama 2",
        "rope_parameters",
        {"rope_type": "default", "factor": 4.0},
        'used, for rope_parameters has rope_type="def',
    ),
    (
        "Gemma 3",
        "rope_parameters",
        {"full_attention": {"factor": 8.0}},
        "rope_parameters.full_attention.factor=8.0: would",
    ),
    (
        "Llama 2",
        "rope_theta",
        5e5,
        "rope_theta=500000.0: would not be used, for rope_parameters has rope_theta=10000.0",
    ),
    ("Phi-4-mini", "sliding_window", -1, "sliding_window=-1: must be at least 1"),
    ("Llama 2", "dtype", "float33", 'dtype="float33": must be the name of a torch dtype'),
    ("Llama 2", "architectures", "LlamaForCausalLM", "must be a list of names"),
    ("Llama 2", "architectures", [1], "architectures=[1]: must be a list of names"),
    ("Llama 2", "model_type", ["llama"], 'model_type=["llama"]: must be a name'),
    ("Llama 2", "pad_token_id", HUGE, f"pad_token_id={HUGE}: Padding_idx must be within num_embeddings"),
    ("GPT-2", "attn_pdrop", -1, "attn_pdrop=-1: dropout probability has to be between 0 and 1"),
    ("GPT-J", "n_positions", HUGE, "this machine has"),
]


@pytest.mark.parametrize(("family", "key", "value", "words"), REFUSED)
def test_a_value_that_cannot_be_is_refused_by_its_key(
    family: str, key: str, value: Any, words: str, tmp_path: Path
) -> None:
    text = refusal(tmp_path, folder_of(family, tmp_path) | {key: value})
    assert text is not None
    assert "config.json: " in text
    assert words in text


@pytest.mark.parametrize(
    "family", ["GPT-2", *(pytest.param(own, marks=pytest.mark.faults) for own in ("Llama 2", "Gemma 2", "BERT"))]
)
def test_whatever_a_configuration_says_nothing_ends_in_a_traceback(family: str, tmp_path: Path) -> None:
    config = folder_of(family, tmp_path)
    values = (None, "x", [1], -1, 0, math.inf, HUGE)
    for place, key in enumerate(config):
        # All values in one family, in turn one of them in the others.
        chosen = values if family == "Llama 2" else (values[place % len(values)],)
        for value in chosen:
            refusal(tmp_path, config | {key: value})
        refusal(tmp_path, {own: known for own, known in config.items() if own != key})


# null where transformers gives it a meaning.
@pytest.mark.parametrize(
    ("family", "key"),
    [("Llama 2", "head_dim"), ("Llama 2", "rope_parameters"), ("Llama 2", "architectures"), ("GPT-2", "pad_token_id")],
)
def test_null_means_what_transformers_says(family: str, key: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, folder_of(family, tmp_path) | {key: None}) is None
    ids = torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(load_model(str(tmp_path)).model(ids).logits, model_of(family).model(ids).logits)


LINEAR = {"type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    "values",
    [
        {"rope_theta": 1e4},
        {"rope_theta": None},
        {"rope_scaling": {}},
        {"rope_scaling": {"factor": 1.0}, "rope_parameters": None},
        {"rope_scaling": LINEAR, "rope_parameters": None},
        {"rope_scaling": LINEAR, "rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5}},
        {"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "factor": 4, "rope_theta": None}},
        {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1.0, "factor": None}},
    ],
)
def test_rotary_embeddings_that_are_used_as_they_stand_are_none_to_refuse(
    values: dict[str, Any], tmp_path: Path
) -> None:
    assert refusal(tmp_path, folder_of("Llama 2", tmp_path) | values) is None


# transformers takes the old name's, and forgets the base that only the new one's have.
@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"rope_type": "linear", "factor": 8.0}, "rope_parameters.factor=8.0"),
        ({**LINEAR, "rope_theta": 5e5}, "rope_parameters.rope_theta=500000.0"),
        ({"rope_type": "default"}, 'rope_parameters.rope_type="default"'),
        ({"full_attention": LINEAR}, "rope_parameters.full_attention="),
        ({"factor": 4.0, "rope_type": "yarn"}, 'rope_parameters.rope_type="yarn"'),
    ],
)
def test_rotary_parameters_that_another_name_hides_are_refused(
    parameters: dict[str, Any], words: str, tmp_path: Path
) -> None:
    text = refusal(tmp_path, folder_of("Llama 2", tmp_path) | {"rope_scaling": LINEAR, "rope_parameters": parameters})
    assert text is not None
    assert words in text
    assert "would not be used, for there is a rope_scaling beside it" in text


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"{", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b'{"a": ' * 100_000]
)
def test_a_configuration_that_is_no_json_object_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with refused(ModelError, "model.source", says=r"cannot be loaded: config\.json is no JSON"):
        inspect_model(fetch(str(tmp_path)))


def test_a_key_that_stands_twice_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "a": {"hidden_size": 24, "hidden_size": 32}}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with refused(ModelError, "model.source", says=r"config\.json: has an object with the key 'hidden_size' twice"):
        inspect_model(fetch(str(tmp_path)))
