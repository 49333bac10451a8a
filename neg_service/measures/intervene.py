"""What joint interventions do: probabilities and predictions with and without edits of any sets of neurons.

Every edit of a prompt is one row of a batch, next to a row without edits; prompts run together, over shared prefixes,
as they do for gradients. Changes of probability are differences that were never subtracted (`readout.py`), so the
effect of a joint shift compares with the sum of its neurons' NEGs down to small shifts. What edits are: `edits.py`.

A neuron of an expert that the token does not use, without the edit or because of what it does in lower layers, is not
there to be changed: results say how many were.

Axes: P prompts, E edits, K targets of a prompt, R rows of a batch, i single changes: one neuron in one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neg_service.errors import ConfigurationError, told_by_parameters
from neg_service.measures.batching import budget_of, encoded_prompts, in_batches, named
from neg_service.measures.edits import CheckedEdit, Edit, checked_edits
from neg_service.measures.gradients import gradients
from neg_service.measures.readout import Readout
from neg_service.measures.routing import PromptRouting, routing_of_rows
from neg_service.measures.sequences import TokenLogP, TreeBaseline, tree_of
from neg_service.measures.targets import check_at, check_each
from neg_service.models.batches import Budget
from neg_service.models.engines.base import Rows
from neg_service.models.engines.trees import TargetTree
from neg_service.models.experts_function import watching_routing
from neg_service.models.feed_forward import FeedForward, Point, Site, hooks
from neg_service.models.language_model import LanguageModel
from neg_service.models.start_at_layer import flat
from neg_service.models.transfer import sent
from neg_service.prompts.chat import prompts_of
from neg_service.prompts.prompt import Asked, At, EncodedPrompt, check_prompts, check_texts

Doubles = NDArray[np.float64]


# So many edits of a prompt are rows of one batch.
_EDITS_TOGETHER = 64


@dataclass(frozen=True)
class InterveneResult:
    """Probabilities and predictions before and after edits; prompts with fewer targets than K are padded with NaN.

    edits: the names of the E edits. probability_before: [P, K]. probability: [P, E, K], 0..1.
    delta_p: [P, E, K], the difference of the two, far more exact than subtracting them.
    prediction_before: [P], prediction: [P, E]: index of the most probable target, the lower one on a tie.
    n_targets: [P], how many of the K are real. n_routed: [P, E], how many of an edit's neurons were there to be
    changed: all of them, but those of experts that the token does not use, or none of those at which it is edited.
    """

    edits: tuple[str, ...]
    probability_before: Doubles
    probability: Doubles
    delta_p: Doubles
    prediction_before: NDArray[np.int64]
    prediction: NDArray[np.int64]
    n_targets: NDArray[np.int64]
    n_routed: NDArray[np.int64]


@told_by_parameters(
    model__source="model", dataset__source="prompts", dataset__chat_template="model.tokenizer.chat_template"
)
def intervene(
    model: LanguageModel,
    prompts: Sequence[Asked],
    targets: Sequence[Sequence[str]],
    edits: Sequence[Edit | Mapping[str, Any]],
    *,
    basis: str = "paper",
    answers: Sequence[int | None] | None = None,
    batch_bytes: int | None = None,
    batch_tokens: int | None = None,
    not_one_token: str = "error",
    at: str = "readout",
    neurons_at: Sequence[At | None] | None = None,
) -> InterveneResult:
    """Change sets of neurons at each prompt's readout position, and read the targets before and after.

    Args:
        model: from `load_model`.
        prompts: P texts; or lists of messages, `{"role": ..., "content": ...}`, for the model's chat template.
        targets: for each prompt, texts that follow it verbatim; each must be one token there, unless `not_one_token`
            is `sequence`: then the probability of a target is the product over its tokens.
        at: `each` moves neurons at every token that predicts one of such a target's, and not at the readout position
            alone.
        neurons_at: where neurons are, if not at the readout position: for each prompt a text of it, whose last token
            is meant, a range of characters, or a token's place from either end.
        edits: E edits, `Edit` or mappings such as `{"neurons": [(29, 864)], "shift": 0.5}`; see `edits.py`.
        basis: which tensor is "the neuron": `paper`, `hidden` or `gate`.
        answers: for each prompt the index of the target that `enhance` favours; the first target where not given.
        batch_bytes: memory that a batch may take; if not given, what keeps the device busy and fits it. Halved by
            itself when memory ends, and recovers; never changes the results. batch_tokens: its old name and unit.

    Raises:
        PromptError: an unusable prompt or target.
        ConfigurationError: an edit that the model cannot do, an unknown basis.
        ModelError: the model fails its self-check, which runs once, before the first measurement.
        NonFiniteError: NaN or infinity in a prompt's logits.
    """
    check_texts(prompts, targets)
    given = answers if answers is not None else [None] * len(prompts)
    if not len(prompts) == len(targets) == len(given):
        raise ConfigurationError(
            f"{len(prompts)} prompts, targets for {len(targets)} and answers for {len(given)}; one for each prompt is "
            "needed"
        )
    asked = prompts_of(model, prompts, targets, given, neurons_at)
    check_prompts(asked)
    check_at(at, "at")
    checked = checked_edits(edits, model.feed_forward.layer_neurons)
    encoded = encoded_prompts(model, asked, not_one_token)
    check_each(at, encoded)
    model.ensure_checked()
    budget = budget_of(model, batch_bytes, batch_tokens)
    p, e, k = len(asked), len(checked), max(len(prompt.targets) for prompt in asked)
    before, delta = np.full((p, k), np.nan), np.full((p, e, k), np.nan)
    n_routed = np.zeros((p, e), np.int64)
    for index, found in effects(model, encoded, checked, basis, budget, at == "each"):
        own = len(found.probability_k)
        before[index, :own], delta[index, :, :own] = found.probability_k, found.delta_p_ek
        n_routed[index] = found.n_routed_e
    after = before[:, None] + delta
    return InterveneResult(
        edits=tuple(edit.name for edit in checked),
        probability_before=before,
        probability=after,
        delta_p=delta,
        prediction_before=np.nanargmax(before, -1),
        prediction=np.nanargmax(after, -1),
        n_targets=np.array([len(prompt.targets) for prompt in asked]),
        n_routed=n_routed,
    )


@dataclass(frozen=True)
class Effects:
    """Of one prompt: probabilities of its targets without edits [K], and what each edit changes [E, K].

    n_routed_e: how many of each edit's neurons were there to be changed. routing: of the prompt without edits.
    token_log_p: of each target its tokens' log p without edits, where any is several tokens.
    """

    probability_k: Doubles
    delta_p_ek: Doubles
    n_routed_e: NDArray[np.int64]
    routing: PromptRouting
    token_log_p: TokenLogP = None


def effects(
    model: LanguageModel, prompts: Sequence[EncodedPrompt], edits: Sequence[CheckedEdit], basis: str, budget: Budget,
    each: bool = False,
) -> Iterator[tuple[int, Effects]]:  # fmt: skip
    """Run edits on prompts in whatever order is cheapest; yields (index, effects), each index once.

    each: edit neurons at every token that predicts one of a target's, and not at the readout position alone.

    Very many edits run a part at a time, each part beside an unedited row of its own.

    Raises:
        DoesNotFit: a prompt with a part of the edits does not fit.
        NonFiniteError: NaN or infinity in a prompt's logits, without or with an edit.
    """
    signs = _signs_of_neg(model, prompts, edits, basis, budget, each)
    points = model.feed_forward.sites(basis)
    readout = Readout(model)

    found: list[list[Effects]] = [[] for _ in prompts]
    for start in range(0, len(edits), _EDITS_TOGETHER):
        part = range(len(edits))[start : start + _EDITS_TOGETHER]

        def run(indices: Sequence[int], shared: tuple[int, ...], part: range = part) -> list[Effects]:
            own, own_signs = [prompts[i] for i in indices], [signs[i] for i in indices]
            return _run_batch(model, readout, own, own_signs, {e: edits[e] for e in part}, points, shared, each)

        for index, effects_of_part in in_batches(model, prompts, [1 + len(part)] * len(prompts), run, budget):
            found[index].append(effects_of_part)
    for index, parts in enumerate(found):
        delta_p_ek, n_routed_e = (np.concatenate([getattr(own, name) for own in parts]) for name in _OF_EDITS)
        yield index, Effects(parts[0].probability_k, delta_p_ek, n_routed_e, parts[0].routing, parts[0].token_log_p)


_OF_EDITS = ("delta_p_ek", "n_routed_e")


@dataclass(frozen=True)
class _Change:
    """What a site's edits do in a batch: a[row, neuron] -> factor·a + constant·(sign of a without edits, or 1).

    expert_i: of which expert a neuron is, of a site of experts.
    """

    row_i: Tensor
    unedited_row_i: Tensor
    expert_i: Tensor
    neuron_i: Tensor
    factor_i: Tensor
    constant_i: Tensor
    by_sign_i: Tensor

    def of_rows(self, is_kept_r: Tensor) -> _Change:
        """That of some rows."""
        kept_i = is_kept_r[self.row_i]
        return _Change(**{field.name: getattr(self, field.name)[kept_i] for field in fields(self)})


@torch.no_grad()
def _run_batch(
    model: LanguageModel,
    readout: Readout,
    prompts: Sequence[EncodedPrompt],
    signs: Sequence[Mapping[int, Doubles]],
    edits: Mapping[int, CheckedEdit],
    points: Mapping[Site, Point],
    shared: tuple[int, ...],
    each: bool = False,
) -> list[Effects]:
    counts = [1 + len(edits)] * len(prompts)
    trees = [tree_of(prompt) for prompt in prompts if prompt.is_tree]
    rows, positions_rq = _rows(model, prompts, trees, counts, shared, each)
    changes = _changes(model.feed_forward, points, edits, signs)
    n_read = [len(tree.row.read) for tree in trees] or [1] * len(prompts)
    n_routed_r = torch.zeros(sum(counts), dtype=torch.int64)

    def change(site: Site, x: Tensor) -> Tensor:
        own, changed = changes[site], x.clone()
        neurons = points[site].neurons(flat(changed))
        experts = model.feed_forward.experts[site.layer]
        chosen_tk = routing[experts.module].expert_tk if site.is_experts and experts is not None else None
        n_of_expert = 0 if experts is None else experts.n_neurons
        was_there_i = torch.zeros(len(own.row_i), dtype=torch.bool, device=neurons.device)
        # The readout position first; then its place in a row's other sequences, and other tokens.
        for positions_r in positions_rq.T:
            is_token_r = positions_r >= 0
            own_i = sent(is_token_r[own.row_i].nonzero()[:, 0], neurons.device)
            was_there_i[own_i] |= _edit(own.of_rows(is_token_r), neurons, positions_r, chosen_tk, n_of_expert)
        n_routed_r.index_add_(0, own.row_i, was_there_i.long().cpu())
        return changed

    with (
        watching_routing() as routing,
        hooks({site: points[site] for site in changes}, change),
        readout.differences(counts, n_read) as head_rv,
    ):
        logits_rv = rows.run(counts)
    first_r = torch.cumsum(torch.tensor([0, *counts[:-1]]), 0)
    routings = routing_of_rows(model.feed_forward, routing, positions_rq[first_r, 0])
    results, start = [], 0
    for b, prompt in enumerate(prompts):
        first, end = b * counts[b], start + counts[b] * n_read[b]
        head_nsv = head_rv[0][start:end].view(counts[b], n_read[b], -1)
        logits_sv = logits_rv[start : start + n_read[b]]
        p_k, log_p_ek, token_log_p = _read(
            readout, prompt, trees[b] if trees else None, head_nsv, logits_sv, named(prompt, model)
        )
        start = end
        n_routed_e = n_routed_r[first + 1 : first + counts[b]].numpy()
        delta_p_ek = (p_k * log_p_ek.expm1()).cpu().numpy()
        results.append(Effects(p_k.cpu().numpy(), delta_p_ek, n_routed_e, routings[b], token_log_p))
    return results


def _rows(
    model: LanguageModel, prompts: Sequence[EncodedPrompt], trees: Sequence[TargetTree], counts: Sequence[int],
    shared: tuple[int, ...], each: bool,
) -> tuple[Rows, Tensor]:  # fmt: skip
    """Prompts' rows, of several tokens where there are trees, and the places at which each is edited [R, Q], or -1."""
    ids = [prompt.until_shifted for prompt in prompts]
    if trees:
        of_trees = model.ensure_checked_for_trees().engine.trees(ids, [[tree.row] for tree in trees], shared)
        return of_trees, of_trees.each_positions(counts) if each else of_trees.copies(counts)
    rows = model.rows(ids, shared)
    return rows, rows.positions(counts)[:, None]


def _read(
    readout: Readout, prompt: EncodedPrompt, tree: TargetTree | None, head_nsv: Tensor, logits_sv: Tensor, who: str
) -> tuple[Tensor, Tensor, TokenLogP]:
    """p [K] of a prompt's targets without edits, Δ log p [E, K] of each edit, in float64, and tokens' log p.

    head_nsv: the head's output behind each token that is read, of the unedited row, then differences from it.
    """
    if tree is not None:
        of_tree = TreeBaseline.of(readout, head_nsv[0], logits_sv, tree, who)
        log_p_ek = of_tree.changes(readout, head_nsv[1:])[0].double()
        return of_tree.log_p_k.exp(), log_p_ek, of_tree.token_log_p()
    baseline = readout.baseline(head_nsv[0, 0], logits_sv[0], who)
    log_p_ek = readout.delta_log_p(baseline, head_nsv[1:, 0], prompt.target_ids).double()
    return baseline.p_v[list(prompt.target_ids)].double(), log_p_ek, None


def _edit(own: _Change, neurons: Tensor, positions_r: Tensor, chosen_tk: Tensor | None, n_of_expert: int) -> Tensor:
    """Change a site's neurons [tokens, N] at rows' positions; gives which single changes had a neuron to change.

    chosen_tk: the experts that each token used, of a site of experts, each of which has `n_of_expert` neurons.
    """
    device = neurons.device
    token_i, unedited_token_i = (positions_r[rows_i].to(device) for rows_i in (own.row_i, own.unedited_row_i))
    column_i, is_there_i = own.neuron_i.to(device), torch.ones(len(token_i), dtype=torch.bool, device=device)
    unedited_column_i, was_there_i = column_i, is_there_i
    if chosen_tk is not None:
        expert_i1 = own.expert_i.to(device)[:, None]
        is_own_ik, was_own_ik = (chosen_tk[tokens_i] == expert_i1 for tokens_i in (token_i, unedited_token_i))
        is_there_i, was_there_i = is_own_ik.any(1), was_own_ik.any(1)
        unedited_column_i = was_own_ik.int().argmax(1) * n_of_expert + column_i
        column_i = is_own_ik.int().argmax(1) * n_of_expert + column_i
    # What was not there was silent, and can only grow.
    was_negative = (neurons[unedited_token_i, unedited_column_i] < 0) & was_there_i
    sign = torch.where(was_negative & own.by_sign_i.to(device), -1.0, 1.0)
    moved = own.factor_i.to(device) * neurons[token_i, column_i].double() + own.constant_i.to(device) * sign
    neurons[token_i[is_there_i], column_i[is_there_i]] = moved[is_there_i].to(neurons.dtype)
    return is_there_i


def _changes(
    feed_forward: FeedForward, sites: Iterable[Site], edits: Mapping[int, CheckedEdit],
    signs: Sequence[Mapping[int, Doubles]],
) -> dict[Site, _Change]:  # fmt: skip
    """The changes of each site, for `len(signs)` prompts with a row without edits and one for each edit."""
    n_prompts, n_rows = len(signs), 1 + len(edits)
    parts: dict[Site, list[NDArray[np.float64]]] = {}
    for place, (e, edit) in enumerate(edits.items()):
        factor = np.ones(len(edit.values))
        if edit.operation in ("scale", "set"):
            factor = edit.values if edit.operation == "scale" else np.zeros(len(edit.values))
        by_sign = edit.operation in ("shift", "enhance", "suppress") and not edit.is_signed
        for b in range(n_prompts):
            constant = np.zeros(len(factor)) if edit.operation == "scale" else edit.values
            if edit.operation in ("enhance", "suppress"):
                way = edit.polarity if edit.polarity is not None else signs[b][e]
                constant = constant * way * (1 if edit.operation == "enhance" else -1)
            layer, expert, neuron = edit.neurons.layer, edit.neurons.expert, edit.neurons.neuron
            row = np.full(len(factor), b * n_rows + 1 + place)
            by_sign_n = np.full(len(factor), by_sign)
            edited = set(layer.tolist())
            for site in [site for site in sites if site.layer in edited]:
                is_own = feed_forward.are_at(site, layer, expert, neuron)
                if is_own.any():
                    place_n = neuron - feed_forward.numbers(site).start
                    columns = np.stack([row, row - 1 - place, expert, place_n, factor, constant, by_sign_n])
                    parts.setdefault(site, []).append(columns[:, is_own])
    return {site: _change(np.concatenate(own, 1)) for site, own in sorted(parts.items())}


def _change(columns: NDArray[np.float64]) -> _Change:
    row, unedited, expert, neuron, factor, constant, by_sign = map(torch.from_numpy, columns.copy())
    return _Change(row.long(), unedited.long(), expert.long(), neuron.long(), factor, constant, by_sign.bool())


def _signs_of_neg(
    model: LanguageModel, prompts: Sequence[EncodedPrompt], edits: Sequence[CheckedEdit], basis: str, budget: Budget,
    each: bool,
) -> list[dict[int, Doubles]]:  # fmt: skip
    """For each prompt, the sign of NeurGrad of the neurons of each edit, by the edit's index, that needs it."""
    needing = {e: edit for e, edit in enumerate(edits) if edit.needs_sign_of_neg}
    signs: list[dict[int, Doubles]] = [{} for _ in prompts]
    if not needing:
        return signs
    layers = sorted({layer for edit in needing.values() for layer in edit.neurons.layers})
    wanted = [(prompt.prompt.answer or 0,) for prompt in prompts]
    for index, found in gradients(model, prompts, wanted, basis, layers, budget, each):
        neurgrad_m = found.neurgrad_km[0]
        for e, edit in needing.items():
            place_n = found.slots.places_of(edit.neurons)
            signs[index][e] = np.where((place_n >= 0) & (neurgrad_m[place_n] < 0), -1.0, 1.0)
    return signs
