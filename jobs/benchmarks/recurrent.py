"""A model with recurrent layers: steps from a frozen state against whole sequences, for one prompt.

Both engines run the same model with random weights, take turns in one process, and give the same numbers, which is
compared. A prompt's first pass, which freezes its state, is timed on its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers as hf

from jobs.benchmarks.figures import bar, figure, ratio
from neg_service.measures.batching import budget_of
from neg_service.measures.interventions import Interventions
from neg_service.models.engines.base import Engine
from neg_service.models.engines.full_sequence import FullSequenceEngine
from neg_service.models.engines.recurrent_state import RecurrentStateEngine
from neg_service.models.engines.select import Selection
from neg_service.models.feed_forward import Site
from neg_service.models.language_model import LanguageModel
from neg_service.models.loading import set_threads
from neg_service.prompts.prompt import EncodedPrompt, Prompt

_INTERVENTIONS, _ALL_THREE = "interventions, ", "interventions in three layers"


@dataclass
class Settings:
    """See `conf/benchmark/recurrent.yaml`."""

    name: str
    threads: int
    repeats: int
    layers: int
    hidden: int
    neurons: int
    vocabulary: int
    tokens: int
    targets: int
    interventions: int


def run(settings: Settings) -> dict[str, Any]:
    """Measure; the result's `bars` say what was reached."""
    set_threads(settings.threads)
    model, prompt = _random_model(settings), _prompt(settings)
    chosen = model.ensure_checked()
    engines: dict[str, type[Engine]] = {own.name: own for own in (RecurrentStateEngine, FullSequenceEngine)}
    layers = {"bottom": 0, "middle": settings.layers // 2, "top": settings.layers - 1}
    seconds: dict[str, list[float]] = {}
    values: dict[str, Any] = {}
    for turn in range(settings.repeats + 1):
        for name, engine in engines.items():
            model.adopt(Selection(engine(model._loaded), chosen.check))
            for what, (took, found) in _timed(settings, model, prompt, layers).items():
                sys.stderr.write(f"{f'repeat {turn}' if turn else 'warm-up'}: {what} by {name} {1e3 * took:.4g} ms\n")
                values.setdefault(what, {})[name] = found
                if turn:
                    seconds.setdefault(f"{what}, {name}", []).append(took)
    fast, slow = engines
    for name in engines:
        of_layers = zip(
            *(seconds[f"{what}, {name}"] for what in values if what.startswith(_INTERVENTIONS)), strict=True
        )
        seconds[f"{_ALL_THREE}, {name}"] = [sum(own) for own in of_layers]
    ratios = {what: ratio(seconds[f"{what}, {slow}"], seconds[f"{what}, {fast}"]) for what in (*values, _ALL_THREE)}
    measured = [what for what in values if what != "first pass"]
    return {
        "engine": chosen.engine.name,
        "milliseconds": {name: figure([1e3 * one for one in own], "ms") for name, own in seconds.items()},
        f"{slow} over {fast}": ratios,
        "largest relative difference": max(_difference(*values[what].values()) for what in measured),
        "note": "gradients: a row for each target against one row for all; top layer: mostly the readout, as for both",
        "bars": [bar(_ALL_THREE, ratios[_ALL_THREE]["median"], 20, at_most=False)],
    }


def _timed(
    settings: Settings, model: LanguageModel, prompt: EncodedPrompt, layers: dict[str, int]
) -> dict[str, tuple[float, Any]]:
    """Seconds, and what was found, of a prompt's first pass, its gradients, and interventions in some layers."""
    found: dict[str, tuple[float, Any]] = {}

    def timed(what: str, way: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        value = way()
        found[what] = time.perf_counter() - began, value
        return value

    budget = budget_of(model)
    interventions = timed("first pass", lambda: Interventions(model, prompt, "paper"))
    timed("gradients", lambda: interventions.neurgrad(range(settings.layers), budget).numpy())
    neurons, shifts = torch.arange(settings.interventions), torch.linspace(-2, 2, settings.interventions)
    for where, layer in layers.items():
        run_rows = partial(interventions.delta_log_p, Site(layer), neurons, shifts, budget)
        timed(f"{_INTERVENTIONS}{where} layer", run_rows)
    return found


def _difference(found: Any, expected: Any) -> float:
    # Of interventions the first of two, the other is about experts.
    found, expected = (own[0] if isinstance(own, tuple) else own for own in (found, expected))
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _random_model(settings: Settings) -> LanguageModel:
    torch.manual_seed(0)
    kinds = ["full_attention" if layer % 4 == 3 else "linear_attention" for layer in range(settings.layers)]
    config = hf.Qwen3_5TextConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.neurons,
        num_hidden_layers=settings.layers,
        layer_types=kinds,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=settings.hidden // 4,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=settings.hidden // 4,
        linear_value_head_dim=settings.hidden // 4,
        max_position_embeddings=4096,
    )
    model = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif "conv1d" in name:
                parameter.normal_(0, 0.5)
    return LanguageModel(model, name="random hybrid")


def _prompt(settings: Settings) -> EncodedPrompt:
    draw = np.random.default_rng(0)
    targets = draw.choice(settings.vocabulary, settings.targets, replace=False).tolist()
    ids = draw.integers(3, settings.vocabulary, settings.tokens).tolist()
    return EncodedPrompt(Prompt("0", "-", tuple(map(str, targets))), tuple(ids), tuple(targets))
