"""Gradients of targets of several tokens against those of one token: the same prompts, in one process, taking turns.

The targets of a prompt have nothing in common, which is the dearest that they can be.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.benchmarks.figures import bar, figure, ratio
from neg_service import load_model
from neg_service.measures.batching import budget_of
from neg_service.measures.gradients import gradients
from neg_service.models.language_model import LanguageModel
from neg_service.models.loading import set_threads
from neg_service.prompts.prompt import EncodedPrompt, Prompt

_MOST = 2


@dataclass
class Settings:
    """See `conf/benchmark/sequences.yaml`."""

    name: str
    model: str
    threads: int
    repeats: int
    targets: int
    target_tokens: int
    prompts: int
    few_shot: list[int]
    facts: list[int]


def run(settings: Settings) -> dict[str, Any]:
    """Measure; the result's `bars` say what was reached."""
    set_threads(settings.threads)
    model = load_model(settings.model, device="cpu")
    seconds: dict[str, list[float]] = {}
    ratios, bars = {}, []
    for kind, lengths in (("few-shot prompts", settings.few_shot), ("bare facts", settings.facts)):
        one, several = f"{kind}, one token", f"{kind}, {settings.target_tokens} tokens"
        data = {
            one: _data(settings, model, lengths, 1),
            several: _data(settings, model, lengths, settings.target_tokens),
        }
        for name, prompts in data.items():
            _seconds(model, prompts[:8])
            seconds[name] = []
        for _ in range(settings.repeats):
            for name, prompts in data.items():
                seconds[name].append(_seconds(model, prompts))
        name = f"{kind}: {settings.targets} targets of {settings.target_tokens} tokens over one token"
        ratios[name] = ratio(seconds[several], seconds[one])
        bars.append(bar(name, ratios[name]["median"], _MOST, at_most=True))
        sys.stderr.write(f"{name}: {ratios[name]['median']}\n")
    return {
        "engine": model.ensure_checked_for_trees().engine.name,
        "seconds_a_prompt": {name: figure(values, "s") for name, values in seconds.items()},
        "ratios": ratios,
        "bars": bars,
    }


def _data(settings: Settings, model: LanguageModel, lengths: Sequence[int], n_tokens: int) -> list[EncodedPrompt]:
    """Prompts of lengths spread evenly behind a header, and targets of so many tokens that differ from the first on."""
    header_tokens, least, most = lengths
    draw, vocabulary = random.Random(0), model.model.config.vocab_size
    header = [draw.randrange(vocabulary) for _ in range(header_tokens)]
    found = []
    for i in range(settings.prompts):
        n = least + (most - least) * i // max(1, settings.prompts - 1)
        ids = (*header, *(draw.randrange(vocabulary) for _ in range(n)))
        first = tuple(draw.sample(range(vocabulary), settings.targets))
        following = tuple(tuple(draw.randrange(vocabulary) for _ in range(n_tokens - 1)) for _ in first)
        prompt = Prompt(str(i), "-", tuple(map(str, first)))
        found.append(EncodedPrompt(prompt, ids, first, following if n_tokens > 1 else ()))
    return found


def _seconds(model: LanguageModel, prompts: Sequence[EncodedPrompt]) -> float:
    """A prompt's time."""
    model.ensure_checked_for_trees()
    model.forget_prefixes()
    wanted, layers = [range(len(own.target_ids)) for own in prompts], range(model.feed_forward.n_layers)
    began = time.perf_counter()
    for _ in gradients(model, prompts, wanted, "paper", layers, budget_of(model)):
        pass
    return (time.perf_counter() - began) / len(prompts)
