"""The engine's time and memory against the floor, the textbook way, an expert's way, and a plain forward pass.

Each way has a process of its own, and they take turns. The slow ways run a part of the prompts; lengths are spread
evenly over every eight prompts, and over every two of these, so that seconds per prompt compare. The engine multiplies
as `model.cpu_product` would have it, the others as PyTorch does by itself.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jobs.benchmarks import ways
from jobs.benchmarks.figures import FAST, OFF, bar, figure, ratio, taking_turns
from neg_service import load_model
from neg_service.measures.batching import budget_of
from neg_service.measures.gradients import gradients
from neg_service.models.engines.base import LoadedModel
from neg_service.models.language_model import LanguageModel
from neg_service.models.loading import set_threads
from neg_service.prompts.prompt import EncodedPrompt, Prompt

BLOCK = 8
# Lengths of a block, so that each pair, half and whole has the same mean: short and long ones alternate.
_ORDER = (0, 7, 2, 5, 1, 6, 3, 4)
ONE, EIGHT = "textbook, one prompt at a time", "textbook, batches of 8"
PLAIN_ONE, PLAIN_EIGHT = "plain forward, one prompt at a time", "plain forward, batches of 8"


@dataclass
class Settings:
    """See `conf/benchmark/neurgrad.yaml`."""

    name: str
    model: str
    threads: int
    repeats: int
    header_tokens: int
    least_own_tokens: int
    most_own_tokens: int
    targets: int
    prompts: int
    cpu_product: str = "auto"


Data = tuple[list[list[int]], list[list[int]]]
Way = Callable[[LanguageModel, Data], None]


def run(settings: Settings) -> dict[str, Any]:
    """Measure; the result's `bars` say what was reached."""
    product = chosen_product(settings.model, settings.threads, settings.cpu_product)
    is_fast = product.get("name") == "onednn"
    seconds, peaks = _measure(settings, is_fast)
    own = seconds["engine"]
    # Batches of eight, which take as long and far more memory, run in every other repeat.
    textbook = [min(one, seconds[EIGHT][i // 2]) if i % 2 == 0 else one for i, one in enumerate(seconds[ONE])]
    plain = [min(pair) for pair in zip(seconds[PLAIN_ONE], seconds[PLAIN_EIGHT], strict=True)]
    ratios = {
        "engine over floor": ratio(own, seconds["floor"]),
        "textbook over engine": ratio(textbook, own),
        "expert over engine": ratio(seconds["expert"], own),
        "plain forward over engine": ratio(plain, own),
    }
    memory = "memory, engine over textbook in batches of 8"
    ratios[memory] = ratio(peaks["engine"][::2], peaks[EIGHT])
    bars = [
        bar("engine over floor", ratios["engine over floor"]["median"], 1.4, at_most=True),
        bar("textbook over engine", ratios["textbook over engine"]["median"], 12, at_most=False),
        bar("expert over engine", ratios["expert over engine"]["median"], 3, at_most=False),
        bar(memory, ratios[memory]["median"], 0.25, at_most=True),
    ]
    if is_fast:
        ratios |= {
            f"engine over floor{FAST}": ratio(own, seconds[f"floor{FAST}"]),
            f"textbook{FAST}, over engine": ratio(seconds[f"{ONE}{FAST}"], own),
            f"expert{FAST}, over engine": ratio(seconds[f"expert{FAST}"], own),
            f"engine{OFF}, over engine": ratio(seconds[f"engine{OFF}"], own),
        }
        bars.append(bar(f"engine{OFF}, over engine", ratios[f"engine{OFF}, over engine"]["median"], 1.6, at_most=False))
    return {
        "cpu_product": product,
        "seconds_a_prompt": {name: figure(values, "s") for name, values in seconds.items()},
        "peak_memory": {name: figure(values, "MiB") for name, values in peaks.items()},
        "ratios": ratios,
        "note": f"prompts a repeat: {_counts(settings)}; best textbook and best plain forward are taken in each repeat",
        "bars": bars,
    }


def chosen_product(model: str, threads: int, asked: str) -> dict[str, Any]:
    """What multiplies for the engine, as `CpuProduct` says; other ways have PyTorch's own product."""
    set_threads(threads)
    found = load_model(model, device="cpu", cpu_product=asked).cpu_product
    return {} if found is None else found.as_dict()


def _counts(settings: Settings) -> dict[str, int]:
    """How many prompts each way runs in a repeat."""
    all_of_them, few = settings.prompts, min(BLOCK, settings.prompts)
    return {
        "engine": all_of_them,
        "floor": all_of_them,
        ONE: min(2, few),
        EIGHT: few,
        "expert": min(BLOCK // 2, few),
        PLAIN_ONE: min(BLOCK // 2, few),
        PLAIN_EIGHT: few,
    }


def _measure(settings: Settings, is_fast: bool) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds a prompt and peak memory of each way in each repeat."""
    counts = _counts(settings)
    ways_of: dict[str, Way] = {
        "engine": engine,
        "floor": partial(_floor, header=settings.header_tokens, batch=2 * BLOCK),
        ONE: partial(_textbook, batch=1, few=counts[ONE]),
        EIGHT: partial(_textbook, batch=BLOCK, few=counts[EIGHT]),
        "expert": partial(_expert, few=counts["expert"]),
        PLAIN_ONE: partial(_plain, batch=1, few=counts[PLAIN_ONE]),
        PLAIN_EIGHT: partial(_plain, batch=BLOCK, few=counts[PLAIN_EIGHT]),
    }
    # Other ways are what a user of plain PyTorch has; with oneDNN a second line says what else they could have.
    prepared: dict[str, Callable[[], Callable[[], float]]] = {
        name: partial(_prepare, settings, way, counts[name], "onednn" if is_fast and name == "engine" else "torch")
        for name, way in ways_of.items()
    }
    if is_fast:
        prepared[f"engine{OFF}"] = partial(_prepare, settings, engine, counts["engine"], "torch")
        for name in ("floor", ONE, "expert"):
            prepared[f"{name}{FAST}"] = partial(_prepare, settings, ways_of[name], counts[name], "onednn")
    warm = partial(_textbook, batch=2, few=counts[ONE])
    prepared[EIGHT] = partial(_prepare, settings, ways_of[EIGHT], counts[EIGHT], "torch", warm)
    return taking_turns(prepared, settings.repeats, seldom=[EIGHT])


def _prepare(
    settings: Settings, way: Way, n_prompts: int, cpu_product: str, warm: Way | None = None
) -> Callable[[], float]:
    set_threads(settings.threads)
    model = load_model(settings.model, device="cpu", cpu_product=cpu_product)
    data = data_of(settings, model.model.config.vocab_size)

    def once() -> float:
        model.forget_prefixes()
        began = time.perf_counter()
        way(model, data)
        return (time.perf_counter() - began) / n_prompts

    if warm is not None:
        warm(model, data)
    sys.stderr.write(f"ready: {settings.model}, {n_prompts} prompts\n")
    return once


def data_of(settings: Settings, vocabulary: int) -> Data:
    """Prompts and labels as ids."""
    draw = random.Random(0)
    header = [draw.randrange(vocabulary) for _ in range(settings.header_tokens)]
    spread = settings.most_own_tokens - settings.least_own_tokens
    lengths = [settings.least_own_tokens + spread * _ORDER[i % BLOCK] // (BLOCK - 1) for i in range(settings.prompts)]
    prompts = [[*header, *(draw.randrange(vocabulary) for _ in range(n))] for n in lengths]
    targets = [draw.sample(range(vocabulary), settings.targets) for _ in prompts]
    return prompts, targets


def engine(model: LanguageModel, data: Data) -> None:
    """Gradients of every neuron for every label."""
    prompts, targets = data
    encoded = [
        EncodedPrompt(Prompt(str(i), "-", tuple(map(str, own))), tuple(ids), tuple(own))
        for i, (ids, own) in enumerate(zip(prompts, targets, strict=True))
    ]
    wanted = [range(len(own)) for own in targets]
    layers = range(model.feed_forward.n_layers)
    for _ in gradients(model, encoded, wanted, "paper", layers, budget_of(model)):
        pass


def _floor(model: LanguageModel, data: Data, header: int, batch: int) -> None:
    ways.floor(LoadedModel(model.model, model.feed_forward), data[0], header, batch)


def _textbook(model: LanguageModel, data: Data, batch: int, few: int) -> None:
    ways.textbook(model.model, data[0][:few], data[1][:few], batch)


def _expert(model: LanguageModel, data: Data, few: int) -> None:
    ways.expert(model.model, data[0][:few], data[1][:few])


def _plain(model: LanguageModel, data: Data, batch: int, few: int) -> None:
    ways.plain_forward(model.model, data[0][:few], batch)
