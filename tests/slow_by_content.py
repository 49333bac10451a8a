"""Measures that take known times whatever else the machine does: sleeps, for tests of what is said of time ahead.

A prompt takes `SECONDS_A_PROMPT`, each of its tokens `SECONDS_A_TOKEN`, and each neuron of a sweep `SECONDS_A_NEURON`;
the very first shard of a replica takes `SECONDS_AT_FIRST` longer, as real ones do.
"""

from __future__ import annotations

import time
from typing import Any

from neg_service.measures.base import ShardInput
from neg_service.measures.builtin.neurgrad import NeurGrad
from neg_service.measures.builtin.sweep import NeuronSweep
from neg_service.measures.choice import count_of

SECONDS_A_PROMPT, SECONDS_A_TOKEN, SECONDS_A_NEURON, SECONDS_AT_FIRST = 0.05, 0.02, 0.02, 0.5


class SlowByTokens(NeurGrad):
    """As NeurGrad, later."""

    _is_first = True

    def measure(self, shard: ShardInput) -> Any:
        """After the time that its prompts and their tokens take."""
        time.sleep(_of_prompts(shard) + SECONDS_AT_FIRST * self._is_first)
        self._is_first = False
        return super().measure(shard)


class SlowByNeurons(NeuronSweep):
    """As the sweep, later."""

    def measure(self, shard: ShardInput) -> Any:
        """After the time that its prompts and their neurons take."""
        n_neurons = len(shard.prompts) * count_of(shard.neurons, shard.model.feed_forward.layer_neurons)
        time.sleep(_of_prompts(shard) + SECONDS_A_NEURON * n_neurons)
        return super().measure(shard)


def _of_prompts(shard: ShardInput) -> float:
    return sum(SECONDS_A_PROMPT + SECONDS_A_TOKEN * len(prompt.ids) for prompt in shard.prompts)
