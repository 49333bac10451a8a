"""What is measured in a process: a model with random weights, prompts for its gradients, one for interventions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from jobs.benchmarks import neurgrad
from jobs.benchmarks.gpu import Settings
from jobs.benchmarks.gpu.pacing import Timed
from neg_service.measures.gradients import PromptGradients, gradients
from neg_service.measures.interventions import Interventions
from neg_service.models.batches import Budget
from neg_service.models.language_model import LanguageModel
from neg_service.neurons import NeuronSet
from neg_service.prompts.prompt import EncodedPrompt, Prompt


@dataclass
class Subject:
    """A model in one precision, and what it is asked.

    seconds: what the part that runs may take. engine: what the engine took in parts that ran, by part.
    """

    shape: str
    model: LanguageModel
    settings: Settings
    seconds: float = 0.0
    engine: dict[str, Timed] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.model.device

    @property
    def dtype(self) -> str:
        """Its precision, as settings name it."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        """For the progress."""
        return f"{self.shape}, {self.dtype}"

    @property
    def layers(self) -> dict[str, int]:
        """Three of its layers, by where they are."""
        n = self.model.feed_forward.n_layers
        return {"bottom": 0, "middle": n // 2, "top": n - 1}

    @cached_property
    def data(self) -> neurgrad.Data:
        """Prompts with a common header and their targets, as ids; lengths are spread evenly over every eight."""
        own = self.settings
        shape = neurgrad.Settings(
            name="",
            model="",
            threads=1,
            repeats=1,
            header_tokens=own.header_tokens,
            least_own_tokens=own.least_own_tokens,
            most_own_tokens=own.most_own_tokens,
            targets=own.targets,
            prompts=own.prompts,
        )
        return neurgrad.data_of(shape, int(self.model.model.config.vocab_size))

    @cached_property
    def encoded(self) -> list[EncodedPrompt]:
        """The same, as measures get them."""
        return [
            EncodedPrompt(Prompt(str(i), "-", tuple(map(str, own))), tuple(ids), tuple(own))
            for i, (ids, own) in enumerate(zip(*self.data, strict=True))
        ]

    @cached_property
    def prompt(self) -> EncodedPrompt:
        """The one whose neurons are shifted."""
        draw, vocabulary = random.Random(0), int(self.model.model.config.vocab_size)
        ids = tuple(draw.randrange(vocabulary) for _ in range(self.settings.tokens))
        return EncodedPrompt(Prompt("0", "-", ("-",)), ids, (draw.randrange(vocabulary),))

    def gradients(self, which: Sequence[int], budget: Budget) -> dict[int, PromptGradients]:
        """Gradients of every neuron for every target of some prompts, by prompt."""
        prompts = [self.encoded[i] for i in which]
        wanted = [range(len(own.target_ids)) for own in prompts]
        layers = range(self.model.feed_forward.n_layers)
        found = gradients(self.model, prompts, wanted, "paper", layers, budget)
        return {which[place]: own for place, own in found}

    def run_interventions(self, interventions: Interventions, layer: int, n: int, budget: Budget) -> torch.Tensor:
        """Δ log p [n, K] of so many shifts of neurons of one layer, 40 a neuron."""
        (site, *_) = interventions.sites([layer])
        index_i = torch.arange(n)
        neurons_i = (index_i // 40 % interventions.activation[site].shape[-1]).to(self.device)
        shifts_i = ((index_i % 40 + 1) / 20).to(self.device)
        return interventions.delta_log_p(site, neurons_i, shifts_i, budget)[0]


def first_neurons(interventions: Interventions, layer: int, n: int) -> NeuronSet:
    """The first neurons of a layer that act on the prompt, whether it has experts or not."""
    (site, *_) = interventions.sites([layer])
    slots = interventions.slots([site])
    return NeuronSet.distinct(slots.rows_at(np.arange(min(n, slots.m))))[0]
