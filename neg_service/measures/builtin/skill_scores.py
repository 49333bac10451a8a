"""The measure `skill_scores`: how well each neuron tells right labels from wrong ones, as sums alone.

Over the prompts i of a task with right labels y_i, with g[i, k, n] the NeurGrad of neuron n for label k:

    polarity[n]  = Σ_i (2·sgn g[i, y_i, n] - Σ_k sgn g[i, k, n])
    magnitude[n] = Σ_i Σ_k sgn(g[i, y_i, n] - g[i, k, n])
    fires/b[n]   = Σ_i ±1, +1 where neuron n is active beyond its mean exactly if bit b of y_i is set
    activation[n] = Σ_i a[i, n]

Of an expert's neuron the sums are over the prompts that use the expert. All but the last are whole
numbers, and all add up over shards: one pass over any number of prompts leaves a few numbers
a neuron and shard. `fires` is for the baseline of activations, which tells two sets of labels apart; with more than two
labels their numbers are written in binary, and each bit splits them in halves. A neuron's mean there is that over the
shard's prompts, so that one pass does.

Source: Zhao, Jiang, Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053); activations: Wang et al.,
"Finding Skill Neurons in Pre-trained Transformer-based Language Models", EMNLP 2022 (arXiv 2211.07349).

Axes: P prompts, K labels, N neurons, M neurons of all MLPs and experts that a shard's prompts use.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neg_service import schema
from neg_service.config import NeuronsConfig, checked_layers
from neg_service.layer_neurons import LayerNeurons
from neg_service.measures.base import (
    Cost,
    Measure,
    ShardInput,
    Sizes,
    has_experts,
    layers_of_model,
    n_slots,
    prompt_bytes,
)
from neg_service.measures.sums import Sums
from neg_service.measures.tables import lists, mlp_columns, prompt_tables, table_of
from neg_service.measures.targets import check_answers
from neg_service.prompts.prompt import Prompt
from neg_service.prompts.tasks import task_of
from neg_service.schema import Table
from neg_service.settings import basis_setting
from neg_service.slots import Slots

if TYPE_CHECKING:
    from neg_service.models.inspection import ModelInfo

Floats = NDArray[np.float32]
Scores = dict[str, NDArray[np.floating[Any]]]


def n_bits(n_labels: int) -> int:
    """How many bits the numbers of the labels have."""
    return max(1, (n_labels - 1).bit_length())


def gradient_scores(neurgrad_pkn: Floats, answer_p: NDArray[np.int64]) -> Scores:
    """`polarity` and `magnitude` [N], each a whole number, of prompts with K labels."""
    prompts = np.arange(len(answer_p))
    answer_pn = neurgrad_pkn[prompts, answer_p]
    # Of a row +1 where it is the right label's, and -1 elsewhere: 2·sgn(right) - Σ sgn(all).
    weight_pk = np.full(neurgrad_pkn.shape[:2], -1, np.float32)
    weight_pk[prompts, answer_p] = 1
    n = neurgrad_pkn.shape[2]
    # Sums of at most a few thousand ones are exact in float32.
    polarity = weight_pk.ravel() @ np.sign(neurgrad_pkn).reshape(-1, n)
    ahead = np.zeros(n, np.int32)
    for k in range(neurgrad_pkn.shape[1]):
        own = neurgrad_pkn[:, k]
        ahead += np.count_nonzero(answer_pn > own, axis=0).astype(np.int32)
        ahead -= np.count_nonzero(answer_pn < own, axis=0).astype(np.int32)
    return {"polarity": polarity.astype(np.float64), "magnitude": ahead.astype(np.float64)}


def activation_scores(activation_pn: Floats, answer_p: NDArray[np.int64], n_labels: int) -> Scores:
    """`activation` and `fires/b` [N] of the prompts of a shard."""
    total = activation_pn.sum(0, dtype=np.float64)
    fires_pn = activation_pn > total / len(answer_p)
    # As it is stored, so that sums of stored gradients are the same.
    scores: Scores = {"activation": total.astype(np.float32)}
    for bit in range(n_bits(n_labels)):
        is_set_p = (answer_p >> bit & 1).astype(bool)
        agree = np.count_nonzero(fires_pn == is_set_p[:, None], axis=0)
        scores[f"fires/{bit}"] = 2.0 * agree - len(answer_p)
    return scores


@dataclass
class SkillScoresOptions:
    """See `conf/measure/skill_scores.yaml`."""

    name: str = "skill_scores"
    basis: str = basis_setting()


class SkillScores(Measure[SkillScoresOptions]):
    """Sums that say how well each neuron tells labels apart."""

    Options = SkillScoresOptions
    NAMES = ("skill_scores",)

    def validate(self, info: ModelInfo, neurons: NeuronsConfig, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts without answers, too."""
        super().validate(info, neurons, prompts)
        check_answers(self.name, prompts)

    def tables(self, sizes: Sizes) -> dict[str, Table]:
        """`prompts` and `skill_scores`."""
        scores = Table(schema.skill_scores(layers_of_model(sizes)), "score", schema.NO_UNIT, "values")
        return {**schema.prompt_tables(has_experts(sizes)), "skill_scores": scores}

    def cost(self, info: ModelInfo, neurons: NeuronsConfig, n_targets: float) -> Cost:
        """A shard's sums are spread over its prompts, of which there are mostly many."""
        scores = n_slots(info, checked_layers(neurons, info.n_layers))
        return Cost({**prompt_bytes(info, 1024), "skill_scores": scores}, n_targets)

    def measure(self, shard: ShardInput) -> dict[str, pa.Table]:
        """One shard's sums, a set for each of its tasks."""
        from neg_service.measures import reductions
        from neg_service.measures.gradients import reduced_gradients

        prompts, layers, sizes = shard.prompts, shard.layers, shard.model.feed_forward
        wanted = [range(len(prompt.target_ids)) for prompt in prompts]
        own_tables: dict[int, dict[str, pa.Table]] = {}
        activations: dict[int, tuple[Slots, Floats]] = {}
        sums: dict[str, dict[str, Sums]] = defaultdict(lambda: defaultdict(Sums))
        # That there are answers is checked before.
        reduce = reductions.scores([prompt.prompt.answer or 0 for prompt in prompts])
        for index, found in reduced_gradients(
            shard.model, prompts, wanted, self.options.basis, layers, shard.budget, reduce
        ):
            prompt, (*own, activation_m) = prompts[index], found.values
            own_tables[index] = prompt_tables(prompt, found.probability_k, found.routing, has_experts(sizes))
            activations[index] = found.slots, activation_m
            for name, values_m in zip(("polarity", "magnitude"), own, strict=True):
                sums[task_of(prompt.prompt.id)][name].add(found.slots, values_m)
        parts = []
        for task, own_sums in sums.items():
            members = [i for i, prompt in enumerate(prompts) if task_of(prompt.prompt.id) == task]
            answer_p = np.array([prompts[i].prompt.answer for i in members])
            slots = own_sums["polarity"].slots()
            scores: Scores = {name: own.values() for name, own in own_sums.items()}
            n_labels = len(prompts[members[0]].target_ids)
            scores |= _activation_scores([activations[i] for i in members], answer_p, n_labels, slots)
            parts += self._tables_of(task, len(members), scores, slots, layers_of_model(sizes))
        return {
            **{name: pa.concat_tables(own_tables[i][name] for i in range(len(prompts))) for name in own_tables[0]},
            "skill_scores": pa.concat_tables(parts),
        }

    def _tables_of(
        self, task: str, n_prompts: int, scores: Scores, slots: Slots, layer_neurons: Sequence[LayerNeurons]
    ) -> list[pa.Table]:
        table_schema, n = schema.skill_scores(layer_neurons), len(slots.size)
        return [
            table_of(
                table_schema,
                n,
                task=task,
                n_prompts=np.full(n, n_prompts),
                **mlp_columns(slots.layer, slots.expert),
                basis=self.options.basis,
                score=name,
                values=lists(values_m, slots.size, table_schema.field("values").type),
            )
            for name, values_m in scores.items()
        ]


def _activation_scores(
    activations: Sequence[tuple[Slots, Floats]], answer_p: NDArray[np.int64], n_labels: int, slots: Slots
) -> Scores:
    """`activation_scores` [M] of the neurons of `slots`, each over the prompts that use its expert."""
    found: list[Scores] = []
    by_key: dict[tuple[int, int], list[tuple[int, Floats]]] = defaultdict(list)
    for p, (own, activation_m) in enumerate(activations):
        for g, key in enumerate(zip(own.layer.tolist(), own.expert.tolist(), strict=True)):
            by_key[key].append((p, activation_m[own.start[g] : own.start[g + 1]]))
    for key in zip(slots.layer.tolist(), slots.expert.tolist(), strict=True):
        used = [p for p, _ in by_key[key]]
        found.append(activation_scores(np.stack([own for _, own in by_key[key]]), answer_p[used], n_labels))
    return {name: np.concatenate([own[name] for own in found]) for name in found[0]}
