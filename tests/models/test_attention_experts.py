"""Attention that chooses experts: what it chooses is routing, and none of it is a neuron."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import neg_service
from neg_service.models.experts_function import watching_routing
from tests import mixtures_oracle
from tests.mixture_families import float64_of, model_of, sweep_deviation
from tests.mixtures import MIXTURES
from tests.mixtures_oracle import ATTENTION

FAMILY, TEXT, IDS = "JetMoE", "w3 w14 w9", (3, 14, 9)
SHIFTS = [-2.0, 2.0]


def _changed_by_hand() -> tuple[list[tuple[int, int, int]], np.ndarray, np.ndarray]:
    """Neurons of the first layer, and for which share of shifts MLPs, or attention, above chose others."""
    model, mixture = model_of(FAMILY), MIXTURES[FAMILY]
    found = neg_service.neurgrad(model, [TEXT], [[" w7"]])
    assert found.expert is not None
    assert found.neuron is not None
    neurons = [(0, int(n), int(e)) for e, n in zip(found.expert[0, 0], found.neuron[0, 0], strict=True)]
    reference, shares = float64_of(FAMILY), []
    _, plain = mixtures_oracle.shifted(reference, mixture, IDS, "paper", (-1, -1), 0, 0.0)
    for (layer, neuron, expert), activation in zip(neurons, found.activation[0, 0], strict=True):
        sign = -1 if activation < 0 else 1
        changed = []
        for shift in SHIFTS:
            _, chosen = mixtures_oracle.shifted(reference, mixture, IDS, "paper", (layer, expert), neuron, sign * shift)
            others = [key for key in plain if chosen[key] != plain[key]]
            changed.append((any(key > 0 for key in others), any(key <= ATTENTION for key in others)))
        shares.append(np.mean(changed, 0))
    by_mlps, by_attention = np.array(shares).T
    return neurons, by_mlps, by_attention


def test_what_attention_above_chooses_counts_as_routing() -> None:
    neurons, by_mlps, by_attention = _changed_by_hand()
    found = neg_service.neg(model_of(FAMILY), TEXT, " w7", neurons, SHIFTS).routing_changed
    # Of some neurons attention alone chooses others.
    assert (by_attention > 0)[by_mlps == 0].any()
    assert (found > 0).tolist() == ((by_mlps > 0) | (by_attention > 0)).tolist()


def test_without_it_the_share_would_be_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep_deviation(FAMILY, "paper") < 1e-6
    neurons, by_mlps, by_attention = _changed_by_hand()
    model = model_of(FAMILY)
    for own in model.feed_forward.experts:
        monkeypatch.setitem(own.__dict__, "attention_routers", ())
    found = neg_service.neg(model, TEXT, " w7", neurons, SHIFTS).routing_changed
    assert (found > 0).tolist() == (by_mlps > 0).tolist()
    assert (found > 0).tolist() != ((by_mlps > 0) | (by_attention > 0)).tolist()


def test_it_is_seen_as_such_and_its_hooks_are_gone_after_an_error() -> None:
    model = model_of(FAMILY)
    routers = [layer.self_attention.experts.router for layer in model.model.model.layers]
    assert model.feed_forward.attention_routers == tuple(routers)
    with watching_routing() as seen:
        model.rows([IDS]).run([1])
    mlps = [layer.mlp for layer in model.model.model.layers]
    assert set(seen) == {*routers, *mlps}
    assert [seen[own].is_attention for own in (*routers, *mlps)] == [True] * 3 + [False] * 3
    for router in routers:
        expert_k, weight_k = seen[router].expert_tk[-1], seen[router].weight_tk[-1]
        assert expert_k.tolist() == sorted(set(expert_k.tolist()))
        assert float(weight_k.sum()) == pytest.approx(1)

    @contextmanager
    def failing() -> Iterator[None]:
        handle = mlps[-1].register_forward_pre_hook(_fail)
        try:
            yield
        finally:
            handle.remove()

    with failing(), pytest.raises(KeyError, match="by intent"):
        model.rows([IDS]).run([1])
    assert not [hook for router in routers for hook in router._forward_hooks]
    assert not [own for own in mlps if "forward" in own.__dict__]


def _fail(*_: Any) -> None:
    raise KeyError("by intent")
