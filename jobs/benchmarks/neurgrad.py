"""The engine's time and memory against the floor, the textbook way, an expert's way, and a plain forward pass.

Each way has a process of its own, and they take turns. The slow ways run a part of the prompts; lengths are spread
evenly over every eight prompts, so that seconds per prompt compare.
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
from jobs.benchmarks.figures import bar, figure, ratio, taking_turns
from neg_service import load_model
from neg_service.measures.batching import budget_of
from neg_service.measures.gradients import gradients
from neg_service.models.engines.base import LoadedModel
from neg_service.models.language_model import LanguageModel
from neg_service.models.loading import set_threads
from neg_service.prompts.prompt import EncodedPrompt, Prompt

BLOCK = 8


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


Data = tuple[list[list[int]], list[list[int]]]


def run(settings: Settings) -> dict[str, Any]:
    """Measure; the result's `bars` say what was reached."""
    few = min(BLOCK, settings.prompts)
    few_text = f"{few} prompts a repeat, the others {settings.prompts}"
    ways_of: dict[str, Callable[[LanguageModel, Data], None]] = {
        "engine": engine,
        "floor": partial(_floor, header=settings.header_tokens, batch=2 * BLOCK),
        "textbook, one prompt at a time": partial(_textbook, batch=1, few=few // 2),
        "textbook, batches of 8": partial(_textbook, batch=BLOCK, few=few),
        "expert": partial(_expert, few=few),
        "plain forward, one prompt at a time": partial(_plain, batch=1, few=few),
        "plain forward, batches of 8": partial(_plain, batch=BLOCK, few=few),
    }
    counts = {"engine": settings.prompts, "floor": settings.prompts, "textbook, one prompt at a time": few // 2}
    seconds, peaks = taking_turns(
        {name: partial(_prepare, settings, way, counts.get(name, few)) for name, way in ways_of.items()},
        settings.repeats,
    )
    own = seconds["engine"]
    one, eight = seconds["textbook, one prompt at a time"], seconds["textbook, batches of 8"]
    textbook = [min(pair) for pair in zip(one, eight, strict=True)]
    plain = [
        min(pair)
        for pair in zip(
            seconds["plain forward, one prompt at a time"], seconds["plain forward, batches of 8"], strict=True
        )
    ]
    ratios = {
        "engine over floor": ratio(own, seconds["floor"]),
        "textbook over engine": ratio(textbook, own),
        "expert over engine": ratio(seconds["expert"], own),
        "plain forward over engine": ratio(plain, own),
    }
    ratios["memory, engine over textbook in batches of 8"] = ratio(peaks["engine"], peaks["textbook, batches of 8"])
    return {
        "seconds_a_prompt": {name: figure(values, "s") for name, values in seconds.items()},
        "peak_memory": {name: figure(values, "MiB") for name, values in peaks.items()},
        "ratios": ratios,
        "note": f"slow ways: {few_text}; best textbook and best plain forward are taken in each repeat",
        "bars": [
            bar("engine over floor", ratios["engine over floor"]["median"], 1.4, at_most=True),
            bar("textbook over engine", ratios["textbook over engine"]["median"], 12, at_most=False),
            bar("expert over engine", ratios["expert over engine"]["median"], 3, at_most=False),
            bar(
                "memory, engine over textbook in batches of 8",
                ratios["memory, engine over textbook in batches of 8"]["median"],
                0.25,
                at_most=True,
            ),
        ],
    }


def _prepare(settings: Settings, way: Callable[[LanguageModel, Data], None], n_prompts: int) -> Callable[[], float]:
    set_threads(settings.threads)
    model = load_model(settings.model, device="cpu")
    data = data_of(settings, model.model.config.vocab_size)

    def once() -> float:
        model.forget_prefixes()
        began = time.perf_counter()
        way(model, data)
        return (time.perf_counter() - began) / n_prompts

    sys.stderr.write(f"ready: {settings.model}, {n_prompts} prompts\n")
    return once


def data_of(settings: Settings, vocabulary: int) -> Data:
    """Prompts and labels as ids."""
    draw = random.Random(0)
    header = [draw.randrange(vocabulary) for _ in range(settings.header_tokens)]
    spread = settings.most_own_tokens - settings.least_own_tokens
    lengths = [settings.least_own_tokens + spread * (i % BLOCK) // (BLOCK - 1) for i in range(settings.prompts)]
    # Within every eight, halves have the same mean too: short and long ones alternate.
    lengths = [lengths[i // BLOCK * BLOCK + [0, 7, 2, 5, 1, 6, 3, 4][i % BLOCK]] for i in range(settings.prompts)]
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
