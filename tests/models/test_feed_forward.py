"""The table of MLPs: what is not in it is refused, and of several lists of layers the right one is found."""

from __future__ import annotations

from neg_service.errors import ConfigurationError, ModelError
from neg_service.models.feed_forward import check_basis, find_feed_forward
from tests.refusals import refused
from tests.tiny_models import tiny_model


def test_unknown_mlps_are_refused_by_their_class() -> None:
    model = tiny_model("Llama 2").model
    for layer in model.model.layers:
        layer.mlp.act_fn = None
    with refused(ModelError, says=r"the neurons of LlamaMLP \(layer 0 of LlamaForCausalLM\) are not known"):
        find_feed_forward(model)


def test_a_basis_that_is_none_is_refused_with_those_that_there_are() -> None:
    with refused(ConfigurationError, "measure.basis", "bias", allowed="one of paper, hidden, gate"):
        check_basis("bias", True, "LlamaMLP")
    with refused(ConfigurationError, "measure.basis", "gate", says="GPT2MLP has no gate; use paper or hidden"):
        check_basis("gate", False, "GPT2MLP")
    check_basis("gate", True, "LlamaMLP")


def test_a_model_of_images_and_text_is_measured_in_its_text_layers() -> None:
    # As many layers as the part that reads images has, of which the list comes first.
    model = tiny_model("Gemma 3, images and text")
    assert model.feed_forward.layers is model.model.model.language_model.layers
