"""Every dense family and hybrid against the textbook way: what tests assert, and what the table of families shows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn

import neg_service
from neg_service import LanguageModel
from neg_service.measures.gradients import gradients
from neg_service.models.batches import Budget
from neg_service.models.precision import in_precision
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from neg_service.settings import BASES
from tests import oracle
from tests.tiny_models import MASK, VOCABULARY, tiny_model

# The engine's own float32 against float64; engine and oracle both in float64.
# What a model's own code rounds to float32 (norms, attention) stays so in the float64 copy on which edits run.
NEURGRAD_TOLERANCE, SWEEP_TOLERANCE, JOINT_TOLERANCE = 2e-5, 1e-6, 1e-5
# States add up rounding from token to token.
HYBRID_NEURGRAD_TOLERANCE = 5e-5
PLAIN = (
    "Phi", "GPT-2", "GPT-NeoX (Pythia)", "OPT", "OPT, norm after", "StarCoder", "StarCoder 2", "Nemotron", "BERT",
    "RoBERTa", "XLM-R", "ELECTRA generator", "ALBERT", "DistilBERT", "DeBERTa", "DeBERTa 2 and 3", "MPNet", "GPT-Neo",
    "GPT-J", "CodeGen", "Falcon", "Falcon, new decoder", "Falcon, ALiBi", "BLOOM", "MPT",
)  # fmt: skip

PLAIN_HYBRIDS = ("Nemotron-H",)

SWEPT = [(2, 39), (0, 5), (1, 17)]
SHIFTS = [-2.0, 0.1]
# Two neurons of one layer and one each of others, so that edits meet each other on the way up.
EDITED = [(0, 3), (0, 17), (1, 5), (2, 39)]
EDITS: list[dict[str, Any]] = [
    {"name": "each its own", "neurons": EDITED, "shift": [0.7, -0.2, 0.3, -0.4]},
    {"name": "off", "neurons": EDITED[1:], "scale": 0},
    {"name": "set", "neurons": EDITED, "set": 1.5},
    {"name": "suppress", "neurons": EDITED, "suppress": 0.5},
]


def bases_of(family: str) -> tuple[str, ...]:
    """The bases that a family has."""
    # LFM2's gate is activated by a function, which no hook sees.
    return BASES[:2] if family in (*PLAIN, *PLAIN_HYBRIDS, "LFM2") else BASES


@functools.cache
def model_of(family: str) -> LanguageModel:
    """A family's tiny model, made once; who uses it leaves it as it was."""
    return tiny_model(family)


@functools.cache
def float64_of(family: str) -> nn.Module:
    """The same weights in float64, for the oracle."""
    # Made anew: what passes leave in some modules cannot be copied.
    return tiny_model(family).model.double()


def random_ids(lengths: Sequence[int], is_masked: bool, header: int = 0) -> list[tuple[int, ...]]:
    """Token ids of prompts that share a header; masked ones have their mask at a random place."""
    draw = np.random.default_rng(0)
    shared = draw.integers(3, MASK, header).tolist()
    found = []
    for length in lengths:
        ids = shared + draw.integers(3, MASK, length).tolist()
        if is_masked:
            ids[draw.integers(len(ids))] = MASK
        found.append(tuple(ids))
    return found


def readout(ids: Sequence[int], is_masked: bool) -> int:
    """Where a prompt is read."""
    return list(ids).index(MASK) if is_masked else len(ids) - 1


def layers_with_mlps(model: LanguageModel) -> list[int]:
    """Which layers have neurons; the oracle counts these alone."""
    return [layer for layer, mlp in enumerate(model.feed_forward.mlps) if mlp]


def in_model(model: LanguageModel, neurons: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neurons as the model counts layers."""
    layers = layers_with_mlps(model)
    return [(layers[layer], neuron) for layer, neuron in neurons]


def neurgrad_deviation(
    family: str, basis: str, lengths: Sequence[int], header: int = 0, dtype: torch.dtype = torch.float32
) -> float:
    """Of p, gradients and activations of a batch of unequal prompts, against one backward pass a target in float64.

    The largest of |found - expected| / |expected|, norms over a prompt's neurons.
    """
    model = model_of(family) if dtype == torch.float32 else tiny_model(family, dtype)
    model.ensure_checked()
    # The last prompt is the second once more.
    prompts = random_ids(lengths, model.is_masked, header)
    prompts.append(prompts[1])
    draw = np.random.default_rng(1)
    targets = [draw.choice(VOCABULARY, 1 + (i + 2) % 4, replace=False).tolist() for i in range(len(prompts))]
    encoded = [
        EncodedPrompt(Prompt(str(i), "-", tuple(map(str, own))), ids, tuple(own))
        for i, (ids, own) in enumerate(zip(prompts, targets, strict=True))
    ]
    layers = layers_with_mlps(model)
    found = dict(gradients(model, encoded, [range(len(own)) for own in targets], basis, layers, Budget(2**28)))
    worst = 0.0
    for i, (ids, own) in enumerate(zip(prompts, targets, strict=True)):
        place = readout(ids, model.is_masked)
        p, slopes, activation = oracle.gradients(float64_of(family), ids, own, basis, place)
        pairs = [(found[i].probability_k, p), (found[i].activation_ln, activation)]
        pairs += zip(found[i].gradient_kln, slopes, strict=True)
        worst = max(worst, *(_relative(*pair) for pair in pairs))
    return worst


def sweep_deviation(family: str, basis: str, length: int = 9) -> float:
    """Of Δp of single interventions, against a full forward pass each, all in float64, relative to a neuron's curve."""
    model = model_of(family)
    model.ensure_checked()
    ids = random_ids([length], model.is_masked)[0]
    place, text = readout(ids, model.is_masked), " ".join(f"w{i}" for i in ids)
    _, _, activation = oracle.gradients(float64_of(family), ids, [7], basis, place)
    worst = 0.0
    # Truly float64, for the engine and for the oracle: many architectures cast to float32 on their own.
    with in_precision(model.model, model.feed_forward.layers, torch.float64):
        model.forget_prefixes()
        asked = in_model(model, SWEPT)
        found = neg_service.neg(model, text, "w7" if model.is_masked else " w7", asked, SHIFTS, basis)
        before = oracle.probability_with_shift(model.model, ids, 7, basis, 0, 0, 0.0, place)
        for i, (layer, neuron) in enumerate(SWEPT):
            sign = -1 if activation[layer, neuron] < 0 else 1
            after = [
                oracle.probability_with_shift(model.model, ids, 7, basis, layer, neuron, sign * shift, place)
                for shift in SHIFTS
            ]
            worst = max(worst, _relative(found.delta_p[i], np.array(after) - before))
    return worst


def joint_deviation(family: str, basis: str, lengths: Sequence[int] = (6, 3)) -> float:
    """Of probabilities with several neurons edited at once, against full forward passes, all in float64."""
    model = model_of(family)
    model.ensure_checked()
    prompts = random_ids(lengths, model.is_masked)
    targets = [[7, 8, 11], [1]]
    texts = [" ".join(f"w{i}" for i in ids) for ids in prompts]
    names = [[f"w{t}" if model.is_masked else f" w{t}" for t in own] for own in targets]
    reference = float64_of(family)
    worst = 0.0
    # `suppress` asks for gradients, for which the whole model has to be in one precision.
    copied = LanguageModel(reference, model.tokenizer)
    copied.adopt(model.ensure_checked())
    edits = [{**edit, "neurons": in_model(model, edit["neurons"])} for edit in EDITS]
    found = neg_service.intervene(copied, texts, names, edits, basis=basis, answers=[2, None])
    for p, ids in enumerate(prompts):
        place = readout(ids, model.is_masked)
        for e, after in enumerate(probabilities_by_hand(reference, ids, targets[p], EDITS, [2, 0][p], place, basis)):
            worst = max(worst, _relative(found.probability[p, e, : len(after)], after))
    return worst


def probabilities_by_hand(
    model: Any,
    ids: Sequence[int],
    targets: list[int],
    edits: Sequence[dict[str, Any]],
    answer: int,
    position: int,
    basis: str,
) -> Iterator[np.ndarray]:
    """With each edit in turn: a full forward pass with a hook in each layer."""
    _, neurgrad, activation = oracle.neurgrad(model, ids, [targets[answer]], basis, position)
    for edit in edits:
        yield _with_an_edit(model, ids, targets, edit, activation, neurgrad[0], position, basis)


def _with_an_edit(
    model: Any,
    ids: Sequence[int],
    targets: list[int],
    edit: dict[str, Any],
    activation: np.ndarray,
    neurgrad: np.ndarray,
    position: int,
    basis: str,
) -> np.ndarray:
    with ExitStack() as stack:
        for layer, mlp in enumerate(oracle.layers_of(model)):
            module, side = oracle.neuron_module(mlp, basis)

            def change(x: torch.Tensor, layer: int = layer, side: str = side) -> torch.Tensor:
                x = x.clone()
                row = x.view(-1, x.shape[-1])[position]
                start = len(row) // 2 if side.startswith("second") else 0
                row[start:] = changed_by_hand(edit, activation, neurgrad, layer, row[start:])
                return x

            if side == "input":
                hook = module.register_forward_pre_hook(lambda _m, i, change=change: (change(i[0]), *i[1:]))
            else:
                hook = module.register_forward_hook(lambda _m, _i, out, change=change: change(out))
            stack.callback(hook.remove)
        with torch.no_grad():
            logits = model(torch.tensor([list(ids)])).logits[0, position]
            return logits.double().softmax(-1)[targets].numpy()


def changed_by_hand(
    edit: dict[str, Any], activation_ln: np.ndarray, neurgrad_ln: np.ndarray, layer: int, a: torch.Tensor
) -> torch.Tensor:
    """One layer's neurons after an edit, written out case by case."""
    values = np.broadcast_to(
        next(edit[k] for k in ("shift", "scale", "set", "enhance", "suppress") if k in edit), len(edit["neurons"])
    )
    a = a.clone()
    for i, (own, n) in enumerate(edit["neurons"]):
        if own != layer:
            continue
        sign = -1 if activation_ln[own, n] < 0 else 1
        way = edit["polarity"][i] if "polarity" in edit else (-1 if neurgrad_ln[own, n] < 0 else 1)
        value = float(values[i])
        if "scale" in edit:
            a[n] = a[n] * value
        elif "set" in edit:
            a[n] = value
        elif "shift" in edit:
            a[n] = a[n] + (value if edit.get("signed") else value * sign)
        else:
            a[n] = a[n] + value * sign * way * (1 if "enhance" in edit else -1)
    return a


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# Unequal lengths, one token, longer than the windows.
LENGTHS = (1, 9, 4, 16, 2)
