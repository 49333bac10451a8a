"""Shifts of tiny models, exported, and the same models loaded by the library alone, with constants added by hand."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from neg_service import ControlResult, LanguageModel, control, export_shift
from tests.configurations import tiny
from tests.tiny_models import tiny_model, tiny_tokenizer

IDS = (5, 41, 7, 60, 8)
PROMPT, TARGET = " ".join(f"w{i}" for i in IDS), " w9"


@functools.cache
def model_of(family: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """A tiny model, made once."""
    if family in ("bitnet", "zamba2"):
        return LanguageModel(tiny(family, is_masked=False).to(dtype), tiny_tokenizer(), name=family)
    return tiny_model(family, dtype)


@functools.cache
def steered(family: str, basis: str = "paper", dtype: torch.dtype = torch.float64) -> ControlResult:
    """What `control` found for the prompt; only some layers of it are shifted, so that one is left alone."""
    layers = [1, 3] if family == "zamba2" else [0, 2]
    return control(model_of(family, dtype), PROMPT, TARGET, probability=0.4, basis=basis, neurons=layers)


def exported(place: Path, family: str, form: str, basis: str = "paper", dtype: torch.dtype = torch.float64) -> Path:
    """The folder of the shift of the prompt."""
    own = {"prompt": PROMPT, "target": TARGET}
    return export_shift(model_of(family, dtype), steered(family, basis, dtype), 0, place / "shift", form=form, **own)


def reloaded(family: str, place: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The tiny model's weights in the library's own class, read from files."""
    own = model_of(family, dtype).model
    own.save_pretrained(place / "model")
    attention = own.config._attn_implementation
    return AutoModelForCausalLM.from_pretrained(place / "model", dtype=dtype, attn_implementation=attention).eval()


@torch.no_grad()
def logits(model: Any, ids: Sequence[int] = IDS) -> Tensor:
    """Of all positions [T, V], by a plain pass over the whole prompt."""
    found: Tensor = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    return found


def probability(model: Any, target: int = 9, ids: Sequence[int] = IDS) -> float:
    """Of a token behind the prompt."""
    return float(logits(model, ids)[-1].double().softmax(-1)[target])


@contextmanager
def added_by_hand(modules: Sequence[tuple[nn.Module, Tensor]], places: slice = slice(-1, None)) -> Iterator[None]:
    """Constants added to what modules give, at some positions of prompts that run alone."""
    handles = []
    for module, constant in modules:

        def add(_module: nn.Module, _inputs: Any, output: Tensor, constant: Tensor = constant) -> Tensor:
            changed = output.clone()
            changed.view(-1, output.shape[-1])[places] += constant.to(output.dtype)
            return changed

        handles.append(module.register_forward_hook(add))
    yield
    for handle in handles:
        handle.remove()


def hooks_of(model: nn.Module) -> int:
    """How many hooks there are in a model."""
    return sum(len(own._forward_hooks) + len(own._forward_pre_hooks) for own in model.modules())
