"""An intervention's time against the floor, the textbook way and an expert's way; and what grids of fewer shifts cost.

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
from neg_service.measures.adaptive import RowNoise
from neg_service.measures.base import ShardInput
from neg_service.measures.batching import budget_of
from neg_service.measures.choice import chosen_neurons
from neg_service.measures.curves import sweep_prompt
from neg_service.measures.interventions import Interventions
from neg_service.measures.noise import row_noise
from neg_service.measures.readouts import Readouts
from neg_service.measures.shifts import AdaptiveGrid, Grid, Sweep, adaptive_grid, coarse_grid, full_grid
from neg_service.measures.sweep import sweep_rows
from neg_service.models.language_model import LanguageModel
from neg_service.models.loading import set_threads
from neg_service.models.precision import in_precision
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
    grid_neurons: int
    exact_neurons: int
    together: int
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
    if settings.grid_neurons:
        result["grids"] = grids = _grids(settings, model)
        faster = grids["full grid over adaptive"]["median"]
        result["bars"].append(bar("whole sweep of a prompt, full grid over adaptive", faster, 10, at_most=False))
        shifts = grids["errors"]["adaptive"]["shifts a neuron"]
        for own in result["ratios"].values():
            # An expert runs the whole grid.
            own["expert with 40 shifts, over adaptive, a neuron"] = round(
                own["expert, over engine"]["median"] * 40 / shifts, 1
            )
        if engine_seconds:
            result["arithmetic"] = _arithmetic(model, engine_seconds[0], shifts)
    if settings.together:
        result["prompts together"] = _together(settings, model)
    if settings.headline:
        result["headline"] = headline = _headline(model)
        result["bars"].append(bar("all neurons of a prompt, seconds", headline["seconds"], 90, at_most=True))
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


def _grids(settings: Settings, model: LanguageModel) -> dict[str, Any]:
    """The adaptive and the coarse grid against the full one: how fast, and how far off the full grid in float64."""
    few, more = (
        chosen_neurons(NeuronsConfig(choose="sample", count=count), model.feed_forward.layer_neurons)
        for count in (settings.exact_neurons, settings.grid_neurons)
    )
    grids = {"full": full_grid(), "adaptive": adaptive_grid(), "coarse": coarse_grid()}
    facts = load()
    prompts = list(encode(model.tokenizer, facts[:: len(facts) // 4][:4], model.context_length, model=model))
    seconds: dict[str, list[float]] = {name: [] for name in grids}
    for prompt in prompts:
        interventions = Interventions(model, prompt, "paper")
        for name, grid in grids.items():
            began = time.perf_counter()
            sweep_prompt(interventions, more, Sweep(grid), budget_of(model), False, noise=row_noise(model, "paper"))
            seconds[name].append(time.perf_counter() - began)
            sys.stderr.write(f"{name} grid, {len(more)} neurons: {seconds[name][-1]:.3g} s\n")
    errors = _errors(model, prompts, few, grids)
    speed = {f"full grid over {name}": ratio(seconds["full"], seconds[name]) for name in ("adaptive", "coarse")}
    return {
        "neurons": len(more),
        "seconds": {name: figure(own, "s") for name, own in seconds.items()},
        **speed,
    } | errors


def _together(settings: Settings, model: LanguageModel) -> dict[str, Any]:
    """Neurons of many prompts, a few of each: prompts that run together against one after the other."""
    facts = load()
    prompts = list(
        encode(
            model.tokenizer, facts[:: len(facts) // settings.together][: settings.together], model.context_length,
            model=model,
        )
    )  # fmt: skip
    sweep, noise, readouts = Sweep(adaptive_grid()), row_noise(model, "paper"), Readouts()
    found: dict[str, Any] = {"prompts": len(prompts)}
    for count in (1, 8):
        neurons = NeuronsConfig(choose="sample", count=count)

        def swept(at_once: int, neurons: NeuronsConfig = neurons) -> float:
            began = time.perf_counter()
            for start in range(0, len(prompts), at_once):
                own = prompts[start : start + at_once]
                shard = ShardInput(model, own, neurons, budget=budget_of(model))
                assert len(dict(sweep_rows(shard, sweep, noise, False, readouts))) == len(own)
            return (time.perf_counter() - began) / len(prompts)

        ways_of: dict[str, Callable[[], float]] = {
            "together": partial(swept, len(prompts)),
            "one by one": partial(swept, 1),
        }
        what = f"{len(prompts)} prompts, {count} neurons a layer"
        seconds = _take_turns(ways_of, min(3, settings.repeats), what)
        found[f"{count} neurons of each layer"] = {
            **{f"{name}, a prompt": figure([1e3 * own for own in values], "ms") for name, values in seconds.items()},
            "one by one over together": ratio(seconds["one by one"], seconds["together"]),
        }
    return found


def _errors(
    model: LanguageModel, prompts: Sequence[EncodedPrompt], neurons: NeuronSet, grids: dict[str, Grid | AdaptiveGrid]
) -> dict[str, Any]:
    """Of each grid, over all targets: errors of NEG and r against the full grid in float64, and how often they hold."""
    noise = row_noise(model, "paper")
    found: dict[str, list[dict[str, torch.Tensor]]] = {name: [] for name in grids}
    for prompt in prompts:
        with in_precision(model.model, model.feed_forward.layers, torch.float64):
            exact = _swept(model, prompt, neurons, grids["full"], RowNoise())
        for name, grid in grids.items():
            own = _swept(model, prompt, neurons, grid, noise)
            off = (own["neg"] - exact["neg"]).abs()
            found[name].append(
                {
                    "relative error of NEG": off / exact["neg"].abs(),
                    "error of r": (own["r"] - exact["r"]).abs(),
                    "error over stated error": off / own["error"],
                    "shifts a neuron": own["n_shifts"].double(),
                }
            )
    at = torch.tensor([0.5, 0.9, 0.98, 0.99], dtype=torch.float64)
    told: dict[str, Any] = {"against the full grid in float64, neurons": len(neurons)}
    for name, parts in found.items():
        joined = {key: torch.cat([part[key].flatten() for part in parts]) for key in parts[0]}
        told[name] = {"shifts a neuron": round(float(joined.pop("shifts a neuron").mean()), 2)} | {
            key: dict(zip(("median", "90 %", "98 %", "99 %"), map(_short, own.quantile(at).tolist()), strict=True))
            for key, own in joined.items()
        }
    return {"errors": told}


def _swept(
    model: LanguageModel, prompt: EncodedPrompt, neurons: NeuronSet, grid: Grid | AdaptiveGrid, noise: RowNoise
) -> dict[str, torch.Tensor]:
    interventions = Interventions(model, prompt, "paper")
    swept = sweep_prompt(interventions, neurons, Sweep(grid), budget_of(model), False, noise=noise).evaluated
    p_k = interventions.probability_k.double()
    error = swept.error(noise.sigma * p_k, torch.float32)
    return {"neg": swept.linearity_nk.neg, "r": swept.linearity_nk.r, "error": error, "n_shifts": swept.n_shifts_n}


def _short(value: float) -> float:
    return float(f"{value:.2g}")


def _arithmetic(model: LanguageModel, seconds: float, shifts: float) -> dict[str, Any]:
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
    neurons, neurons_3b = own["layers"] * own["neurons"], LLAMA_3B["layers"] * LLAMA_3B["neurons"]
    return {
        "note": "arithmetic, not measured: the same multiplications a second as here",
        "this model, all neurons, 40 shifts, minutes": round(seconds * neurons * 40 / 60, 1),
        "this model, all neurons, adaptive grid, minutes": round(seconds * neurons * shifts / 60, 2),
        "Llama-3.2-3B, milliseconds an intervention": round(1e3 * seconds * large / small, 2),
        "Llama-3.2-3B, all neurons, adaptive grid, hours": round(
            seconds * large / small * neurons_3b * shifts / 3600, 1
        ),
    }


def _multiplications(sizes: dict[str, int]) -> float:
    """Of an intervention, the mean over layers: half of the layers and the vocabulary head."""
    attention = sizes["hidden"] * sizes["head"] * (2 * sizes["heads"] + 2 * sizes["kv_heads"])
    layer = attention + 3 * sizes["hidden"] * sizes["neurons"]
    return (sizes["layers"] + 1) / 2 * layer + sizes["hidden"] * sizes["vocab"]


def _headline(model: LanguageModel) -> dict[str, Any]:
    """NEG of every neuron of the model on one prompt, by the library's one call."""
    began = time.perf_counter()
    found = neg(model, "The capital of France is", " Paris")
    seconds = time.perf_counter() - began
    interventions = int(found.n_shifts.sum())
    return {
        "neurons": len(found.neurons),
        "shifts a neuron": round(interventions / len(found.neurons), 2),
        "seconds": round(seconds, 1),
        "milliseconds an intervention": round(1e3 * seconds / interventions, 3),
        "share of neurons with |r| >= 0.95": round(float((np.abs(found.r) >= 0.95).mean()), 4),
    }
