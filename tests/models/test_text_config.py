"""The part of a configuration that is about the layers that read tokens."""

from __future__ import annotations

import pytest
import transformers as hf

from neg_service.models.text_config import text_config
from tests.configurations import small_config


def test_most_configurations_are_that_themselves() -> None:
    config = hf.LlamaConfig()
    assert text_config(config) is config


@pytest.mark.parametrize(("model_type", "part"), [("gemma3", "text_config"), ("blt", "decoder_config")])
def test_a_part_of_others_is(model_type: str, part: str) -> None:
    config = small_config(model_type)
    own = getattr(config, part)
    assert text_config(config) is own
    # Also where the part is all that is asked.
    assert text_config(own) is own
    assert own.num_hidden_layers == 4
