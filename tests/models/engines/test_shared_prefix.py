"""What a frozen prefix keeps, and a model whose layers do not go through the attention function."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from neg_service.models.engines.base import LoadedModel, MismatchError
from neg_service.models.engines.prefix_attention import SharedPrefix
from neg_service.models.engines.shared_prefix import SharedPrefixEngine, run_prefix, run_shared_prefix
from tests.families import model_of, random_ids
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("family", ["GPT-2", "Phi-3 and 4", "GPT-NeoX (Pythia)", "Llama 2"])
@pytest.mark.parametrize("lengths", [(9,), (9, 9), (9, 5)])
def test_keys_and_values_that_are_kept_are_no_views_of_a_fused_projection(family: str, lengths: Sequence[int]) -> None:
    own = tiny_model(family)
    model = LoadedModel(own.model, own.feed_forward)
    shared = run_shared_prefix(model, (3, 14, 15, 92, 65))
    prefix = run_prefix(model, random_ids(lengths, False), SharedPrefix())
    for kept in (shared.keys_gcd, shared.values_gcd, prefix.keys_bgtd, prefix.values_bgtd):
        assert kept
        for tensor in kept.values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_layers_whose_attention_is_code_of_their_own_do_not_fit() -> None:
    model = model_of("GPT-J")
    engine = SharedPrefixEngine(LoadedModel(model.model, model.feed_forward))
    with pytest.raises(MismatchError, match="3 of the 3 layers do not go through transformers' attention interface"):
        engine.rows([(3, 4, 5)])
