"""Rows of several tokens: which tree reads which targets, which engine runs it, and that a wrong one is seen."""

from __future__ import annotations

import pytest
import torch

from neg_service.errors import ModelError
from neg_service.models.engines import prefix_trees
from neg_service.models.engines.trees import chain_to, leaves, target_chain, target_tree
from tests.refusals import refused
from tests.tiny_models import tiny_model


def test_a_tree_shares_what_targets_begin_with() -> None:
    #  9 -> 1 -> 2     [1, 2, 3] and [1, 2, 4] end behind 2, [1] behind the root, [5, 6] behind 5
    #    -> 5
    tree = target_tree(9, [[1, 2, 3], [1, 2, 4], [1], [5, 6]])
    assert (tree.row.ids, tree.row.parents, tree.row.shifted) == ((9, 1, 2, 5), (-1, 0, 1, 0), 0)
    assert tree.paths == (((0, 1), (1, 2), (2, 3)), ((0, 1), (1, 2), (2, 4)), ((0, 1),), ((0, 5), (3, 6)))
    assert (tree.row.depths, leaves(tree.row), chain_to(tree.row, 2)) == ((0, 1, 2, 1), [2, 3], [0, 1, 2])
    # Single tokens need no more than the prompt's last one.
    assert target_tree(9, [[1], [2]]).row == target_chain(9, [7]) == target_tree(9, [[3]]).row


@pytest.mark.parametrize(("family", "engine"), [("Llama 2", "differences"), ("GPT-J", "full_sequence")])
def test_the_engine_is_the_models_own_or_runs_whole_sequences(family: str, engine: str) -> None:
    model = tiny_model(family)
    assert model.ensure_checked_for_trees().engine.name == engine
    assert "rows of several tokens" in model.ensure_checked_for_trees().check.tried[-1]
    assert (model.ensure_checked_for_trees().engine is model.engine) == (family == "Llama 2")


def test_an_engine_that_was_asked_for_refuses_what_it_cannot_run() -> None:
    with refused(ModelError, setting="model.engine", value="kv_cache", says="kv_cache: runs rows of one token"):
        tiny_model("GPT-J", engine="kv_cache").ensure_checked_for_trees()
    assert tiny_model("GPT-J", engine="full_sequence").ensure_checked_for_trees().engine.name == "full_sequence"
    with refused(ModelError, setting="dataset.not_one_token", value="sequence", says="masked model"):
        tiny_model("BERT").ensure_checked_for_trees()


@pytest.mark.parametrize("fault", ["sees all of its row", "wrong position"])
def test_a_tree_that_is_run_wrong_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "wrong position":
        monkeypatch.setattr(prefix_trees.Row, "positions", lambda self, start: (start,) * len(self.ids))
    else:
        real = prefix_trees.TreePass._hidden_keys

        def nothing_hidden(self: prefix_trees.TreePass, *args: object) -> tuple[torch.Tensor, ...]:
            shared, own, row = real(self, *args)  # type: ignore[arg-type]
            return shared, own, torch.zeros_like(row)

        monkeypatch.setattr(prefix_trees.TreePass, "_hidden_keys", nothing_hidden)
    found = tiny_model("Llama 2").ensure_checked_for_trees()
    assert found.engine.name == "full_sequence"
    assert "off plain passes over prompt and target" in found.rejected["differences"]
