"""An intervention's time against the floor, the textbook way and an expert's way; and what the coarse grid costs.

All ways take turns in one process. The engine multiplies as `model.cpu_product` would have it, the others as PyTorch
does by itself. Prefixes, caches and the baseline pass are made ready before a clock starts: over
the thousands of interventions of a sweep they cost nothing. The engine's time is that of a whole sweep of neurons,
curves evaluated and all.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from jobs.benchmarks import ways
from jobs.benchmarks.figures import FAST, OFF, bar, figure, ratio
from neg_service import load_model, neg
from neg_service.config import NeuronsConfig
from neg_service.measures.batching import budget_of
from neg_service.measures.choice import chosen_neurons
from neg_service.measures.interventions import Interventions
from neg_service.measures.neg import sweep_prompt
from neg_service.measures.shifts import Sweep, coarse_grid, full_grid
from neg_service.models.language_model import LanguageModel
from neg_service.models.loading import set_threads
from neg_service.neurons import NeuronSet
from neg_service.prompts.facts import load
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from neg_service.prompts.tokens import encode

FLOOR_ROWS = (256, 512, 1024)
EXPERT_ROWS = 160
# Llama-3.2-3B, from its published configuration.
LLAMA_3B = {"layers": 28, "hidden": 3072, "neurons": 8192, "heads": 24, "kv_heads": 8, "head": 128, "vocab": 128256}


@dataclass
class Settings:
    """See `conf/benchmark/sweep.yaml`."""

    name: str
    model: str
    threads: int
    repeats: int
    tokens: list[int]
    neurons: int
    textbook: int
    coarse_neurons: int
    headline: bool
    cpu_product: str = "auto"


def run(settings: Settings) -> dict[str, Any]:
    """Measure; the result's `bars` say what was reached."""
    set_threads(settings.threads)
    model = load_model(settings.model, device="cpu", cpu_product=settings.cpu_product)
    product = model.cpu_product
    is_fast = product is not None and product.name == "onednn"
    # The other ways are what a user of plain PyTorch has.
    plain = load_model(settings.model, device="cpu", cpu_product="torch") if is_fast else model
    layers = [0, model.feed_forward.n_layers // 2, model.feed_forward.n_layers - 1]
    result: dict[str, Any] = {
        "cpu_product": {} if product is None else product.as_dict(),
        "milliseconds_an_intervention": {},
        "ratios": {},
        "bars": [],
    }
    engine_seconds: list[float] = []
    for tokens in settings.tokens:
        seconds = _take_turns(_ways_of(settings, model, plain, tokens, layers), settings.repeats, f"{tokens} tokens")
        result["milliseconds_an_intervention"][f"{tokens} tokens"] = {
            name: figure([1e3 * value for value in values], "ms") for name, values in seconds.items()
        }
        engine = [sum(own) / len(layers) for own in zip(*(seconds[f"engine, layer {i}"] for i in layers), strict=True)]
        engine_seconds.append(min(engine))
        ratios = _ratios(seconds, engine, layers)
        result["ratios"][f"{tokens} tokens"] = ratios
        result["bars"] += _bars(tokens, ratios)
    result["coarse_grid"] = _coarse(settings, model)
    if engine_seconds:
        result["arithmetic"] = _arithmetic(model, engine_seconds[0])
    if settings.headline:
        result["headline"] = _headline(model)
    result["note"] = "what is over the engine is over the mean of its bottom, middle and top layer"
    return result


def _ratios(seconds: dict[str, list[float]], engine: list[float], layers: Sequence[int]) -> dict[str, Any]:
    """`engine`: its seconds in each repeat, the mean of the layers."""
    found = {
        f"engine over floor, layer {i}": ratio(seconds[f"engine, layer {i}"], seconds[f"floor, layer {i}"])
        for i in layers
    }
    for name, values in seconds.items():
        if not name.startswith(("engine", "floor")):
            found[f"{name}, over engine"] = ratio(values, engine)
    if f"engine, layer {layers[0]}{OFF}" in seconds:
        for i in layers:
            fast, off = f"floor, layer {i}{FAST}", f"engine, layer {i}{OFF}"
            found[f"engine over floor{FAST}, layer {i}"] = ratio(seconds[f"engine, layer {i}"], seconds[fast])
            found[f"{off}, over engine"] = ratio(seconds[off], seconds[f"engine, layer {i}"])
        own = zip(*(seconds[f"engine, layer {i}{OFF}"] for i in layers), strict=True)
        found[f"engine{OFF}, over engine"] = ratio([sum(values) / len(layers) for values in own], engine)
    return found


def _bars(tokens: int, ratios: dict[str, Any]) -> list[dict[str, Any]]:
    found = [
        bar(f"{name}, {tokens} tokens", value["median"], 1.2, at_most=True)
        for name, value in ratios.items()
        if name.startswith("engine over floor,") and FAST not in name
    ]
    textbook = 60 if tokens < 300 else 400
    for name, least in (("textbook, one at a time, over engine", textbook), ("expert, over engine", 1.5)):
        found.append(bar(f"{name}, {tokens} tokens", ratios[name]["median"], least, at_most=False))
    if (name := f"engine{OFF}, over engine") in ratios:
        found.append(bar(f"{name}, {tokens} tokens", ratios[name]["median"], 1.6, at_most=False))
    return found


def _take_turns(ways_of: dict[str, Callable[[], float]], repeats: int, what: str) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways_of}
    for turn in range(repeats + 1):
        for name, way in ways_of.items():
            value = way()
            sys.stderr.write(
                f"{what}, {f'repeat {turn} of {repeats}' if turn else 'warm-up'}: {name} {1e3 * value:.4g} ms\n"
            )
            if turn:
                seconds[name].append(value)
    return seconds


def _ways_of(
    settings: Settings, model: LanguageModel, plain: LanguageModel, tokens: int, layers: Sequence[int]
) -> dict[str, Callable[[], float]]:
    """Each way as a function that gives its seconds an intervention."""
    draw = random.Random(0)
    ids = tuple(draw.randrange(model.model.config.vocab_size) for _ in range(tokens))
    prompt = EncodedPrompt(Prompt("0", "-", ("-",)), ids, (draw.randrange(model.model.config.vocab_size),))
    of_engine, of_plain = (Interventions(own, prompt, "paper") for own in (model, plain))
    sweep = Sweep(full_grid())
    shifts = sweep.grid.shifts.tolist()
    middle, target = layers[1], prompt.target_ids[0]

    def engine(interventions: Interventions, layer: int) -> range:
        neurons = NeuronSet.of_layers({layer: np.arange(settings.neurons)})
        sweep_prompt(interventions, neurons, sweep, budget_of(model), keep_curves=False)
        return range(settings.neurons * len(shifts))

    def floor(interventions: Interventions, layer: int) -> float:
        return min(_timed(partial(ways.remaining_layers, interventions, layer, rows)) for rows in FLOOR_ROWS)

    one = [(middle, n, 1.0) for n in range(settings.textbook)]
    batch = [(middle, 0, shift) for shift in shifts]
    many = [(middle, n, shift) for n in range(EXPERT_ROWS // len(shifts)) for shift in shifts]

    def textbook(own: LanguageModel, rows: list[tuple[int, int, float]], size: int, logits: int) -> float:
        return _timed(partial(ways.textbook_interventions, own.model, ids, target, rows, size, logits))

    def expert(own: LanguageModel) -> Callable[[], float]:
        return partial(_timed, partial(ways.Cached(own.model, ids, EXPERT_ROWS).interventions, target, many))

    found: dict[str, Callable[[], float]] = {}
    for layer in layers:
        found[f"engine, layer {layer}"] = partial(_timed, partial(engine, of_engine, layer))
        found[f"floor, layer {layer}"] = partial(floor, of_plain, layer)
        if plain is not model:
            found[f"engine, layer {layer}{OFF}"] = partial(_timed, partial(engine, of_plain, layer))
            found[f"floor, layer {layer}{FAST}"] = partial(floor, of_engine, layer)
    found["textbook, one at a time"] = partial(textbook, plain, one, 1, 0)
    found["textbook, one at a time, last logits only"] = partial(textbook, plain, one, 1, 1)
    found["textbook, batched over shifts, last logits only"] = partial(textbook, plain, batch, len(batch), 1)
    found["expert"] = expert(plain)
    if plain is not model:
        found[f"textbook, one at a time{FAST}"] = partial(textbook, model, one, 1, 0)
        found[f"expert{FAST}"] = expert(model)
    return found


def _timed(way: Callable[[], Sized]) -> float:
    """Seconds for each of what `way` gives."""
    began = time.perf_counter()
    done = way()
    return (time.perf_counter() - began) / len(done)


def _coarse(settings: Settings, model: LanguageModel) -> dict[str, Any]:
    """The coarse grid's error against the full one, over all layers and facts of different certainty."""
    sample = NeuronsConfig(choose="sample", count=settings.coarse_neurons)
    neurons = chosen_neurons(sample, model.feed_forward.layer_neurons)
    prompts = load()[:: len(load()) // 4][:4]
    neg_error, r_error = [], []
    for prompt in encode(model.tokenizer, prompts, model.context_length, model=model):
        interventions = Interventions(model, prompt, "paper")
        full, coarse = (
            sweep_prompt(interventions, neurons, Sweep(grid), budget_of(model), False).linearity_nk
            for grid in (full_grid(), coarse_grid())
        )
        neg_error.append(((coarse.neg - full.neg) / full.neg).abs().flatten())
        r_error.append((coarse.r - full.r).abs().flatten())
    errors = {"relative error of NEG": torch.cat(neg_error), "error of r": torch.cat(r_error)}
    found: dict[str, Any] = {"shifts": coarse_grid().shifts.tolist(), "curves": len(errors["error of r"])}
    for name, error in errors.items():
        quantiles = error.quantile(torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)).tolist()
        found[name] = {at: float(f"{q:.2g}") for at, q in zip(("median", "90 %", "99 %"), quantiles, strict=True)}
    return found


def _arithmetic(model: LanguageModel, seconds: float) -> dict[str, Any]:
    """What a whole sweep costs on larger models, from the measured seconds an intervention by multiplications."""
    config = model.model.config
    own = {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "neurons": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head": config.hidden_size // config.num_attention_heads,
        "vocab": config.vocab_size,
    }
    small, large = _multiplications(own), _multiplications(LLAMA_3B)
    interventions = LLAMA_3B["layers"] * LLAMA_3B["neurons"] * 40
    return {
        "note": "arithmetic, not measured: the same multiplications a second as here",
        "this model, all neurons, 40 shifts, hours": round(seconds * own["layers"] * own["neurons"] * 40 / 3600, 2),
        "Llama-3.2-3B, milliseconds an intervention": round(1e3 * seconds * large / small, 2),
        "Llama-3.2-3B, all neurons, 40 shifts, hours": round(seconds * large / small * interventions / 3600, 1),
        "Llama-3.2-3B, all neurons, coarse grid, hours": round(seconds * large / small * interventions / 36000, 1),
    }


def _multiplications(sizes: dict[str, int]) -> float:
    """Of an intervention, the mean over layers: half of the layers and the vocabulary head."""
    attention = sizes["hidden"] * sizes["head"] * (2 * sizes["heads"] + 2 * sizes["kv_heads"])
    layer = attention + 3 * sizes["hidden"] * sizes["neurons"]
    return (sizes["layers"] + 1) / 2 * layer + sizes["hidden"] * sizes["vocab"]


def _headline(model: LanguageModel) -> dict[str, Any]:
    """Every neuron of the model on one prompt, with 40 shifts, by the library's one call."""
    began = time.perf_counter()
    found = neg(model, "The capital of France is", " Paris")
    seconds = time.perf_counter() - began
    return {
        "neurons": len(found.neurons),
        "interventions": found.delta_p.size,
        "minutes": round(seconds / 60, 2),
        "milliseconds an intervention": round(1e3 * seconds / found.delta_p.size, 3),
        "share of neurons with |r| >= 0.95": round(float((np.abs(found.r) >= 0.95).mean()), 4),
    }
