"""One model over two devices: which parts go where, and that everything is brought to where it is needed.

The devices are pretended (`tests/devices.py`): no machine with two GPUs has run this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from accelerate import dispatch_model

import neg_service
from neg_service import LanguageModel
from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError, OutOfMemory
from neg_service.measures import measure_of
from neg_service.models.placement import checked_devices, device_map, require_room
from neg_service.prompts.prompt import Prompt
from neg_service.prompts.tokens import encode
from tests.devices import DEVICES, pretended
from tests.refusals import refused
from tests.shards import measured_shard
from tests.tiny_models import tiny_model

TWO = [torch.device(name) for name in DEVICES.split(",")]


def everything_measured(model: LanguageModel, is_short: bool = False) -> dict[str, np.ndarray]:
    """By every way through the engine, on prompts of unequal length that share a header; in short by two of them."""
    texts = ["w3 w14 w9 w26 w35 w8", "w3 w14 w9 w2", "w50"]
    targets = [[" w7", " w8"], [" w7"], [" w1", " w2"]]
    if model.is_masked:
        texts, targets = [f"{text} w96" for text in texts], [[t.strip() for t in own] for own in targets]
    prompts = [Prompt(str(i), text, tuple(own), 0) for i, (text, own) in enumerate(zip(texts, targets, strict=True))]
    encoded = list(encode(model.tokenizer, prompts, None, model.mask_token))
    edits = [{"neurons": [(0, 3), (2, 39)], "suppress": 0.5}, {"neurons": [(1, 17)], "scale": 0}]
    short = {
        "neurgrad": neg_service.neurgrad(model, texts, targets).neurgrad,
        "intervene": neg_service.intervene(model, texts, targets, edits).delta_p,
    }
    if is_short:
        return short
    neurons = NeuronsConfig(choose="list", list=[[0, 3], [1, 17], [2, 39]])
    sweep = measure_of({"name": "sweep", "shifts": [-1.0, 1.0]})
    swept = measured_shard(sweep, model, prompts, neurons, sweep.calibrate(model, encoded[:1], neurons))["sweep"]
    return {
        **short,
        "integrated_gradients": neg_service.integrated_gradients(model, texts, targets, m=3).integrated_gradients,
        "sweep": np.stack([swept[column].to_numpy() for column in ("neg", "neurgrad", "activation")]),
        "neg": neg_service.neg(model, texts[0], targets[0][0], [(0, 3), (2, 39)], [1.0]).delta_p,
    }


# Of each engine; the others share theirs with the first. What is pretended is slow.
@pytest.mark.parametrize(
    ("family", "is_short"),
    [
        ("Llama 2", True),
        *(
            pytest.param(own, False, marks=pytest.mark.faults)
            for own in ("Llama 2", "Falcon, ALiBi", "ModernBERT", "Gemma 2", "OPT")
        ),
    ],
)
def test_two_devices_measure_what_one_does(family: str, is_short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neg_service.models.batches.PASS_COST", 0)
    expected = everything_measured(tiny_model(family), is_short)
    halves = tiny_model(family)
    with pretended():
        spread = dispatch_model(halves.model, device_map(halves.model, TWO))
        model = LanguageModel(spread, halves.tokenizer, name=family)
        assert model.devices == tuple(TWO)
        found = everything_measured(model, is_short)
    for name, values in expected.items():
        largest = np.nanmax(np.abs(values))
        np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=5e-5 * largest, err_msg=name)


def test_pretended_devices_do_not_mix() -> None:
    with pretended():
        here, there = (torch.ones(3, device=device) for device in TWO)
        assert (here + 1).cpu().tolist() == [2.0] * 3
        assert (there.to(TWO[0]) + here).device == TWO[0]
        for other in (there, torch.ones(3)):
            with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
                here + other


def without_weights(config: hf.PreTrainedConfig) -> Any:
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(config)


def test_layers_are_shared_out_by_their_bytes() -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    model = without_weights(hf.LlamaConfig(**sizes, vocab_size=97, num_hidden_layers=8))
    placed = device_map(model, [torch.device("cuda:0"), torch.device("cuda:1")])
    own = [placed[f"model.layers.{index}"].index for index in range(8)]
    assert own == [0, 0, 0, 0, 1, 1, 1, 1]
    assert (placed["model.embed_tokens"].index, placed["lm_head"].index, placed["model.norm"].index) == (0, 1, 1)
    # A layer has (4·256² + 3·256·512)·4 bytes = 2.6 MB, the embeddings 12.3 MB: of 33.3 MB in all, a half is the
    # embeddings and the first two layers. The head shares the embeddings' weights and lies with them.
    tied = without_weights(hf.LlamaConfig(**sizes, vocab_size=12_000, num_hidden_layers=8, tie_word_embeddings=True))
    placed = device_map(tied, [torch.device("cuda:0"), torch.device("cuda:1")])
    own = [placed[f"model.layers.{index}"].index for index in range(8)]
    assert own == [0, 0, 1, 1, 1, 1, 1, 1]
    assert placed["lm_head"].index == 0
    for name, _ in tied.named_parameters():
        assert any(name.startswith(f"{part}.") for part in placed), name


def test_a_model_is_loaded_straight_to_its_devices(tiny_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both are this machine's memory; a part without a place would be refused all the same.
    monkeypatch.setattr("neg_service.models.loading.checked_devices", lambda _: [torch.device("cpu")] * 2)
    asked: list[dict[str, Any]] = []
    real = hf.LlamaForCausalLM.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: type, *args: Any, **options: Any) -> Any:
        asked.append(options)
        return real(cls, *args, **options)

    monkeypatch.setattr(hf.LlamaForCausalLM, "from_pretrained", classmethod(from_pretrained))
    found = everything_measured(neg_service.load_model(str(tiny_directory)), is_short=True)
    assert {"model.embed_tokens", "model.layers.2", "lm_head"} < set(asked[-1]["device_map"])
    monkeypatch.undo()
    for name, values in everything_measured(neg_service.load_model(str(tiny_directory)), is_short=True).items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_devices_that_are_not_there_are_refused(tiny_directory: Path) -> None:
    assert checked_devices("cuda:0,cuda:1" if torch.cuda.device_count() > 1 else "cpu")
    for device, message in (
        ("abacus,cpu", "abacus is no device that can be used"),
        ("mps", "mps is no device that can be used"),
        ("cpu,cpu", "a device is named twice"),
        ("cuda:98,cuda:99", r"this machine has \d GPUs"),
        ("cpu:0,cpu:1,cpu:2,cpu:3", "4 devices, but LlamaForCausalLM has 3 layers"),
    ):
        with refused(ConfigurationError, "device", says=message):
            neg_service.load_model(str(tiny_directory), device=device)


def test_a_model_that_does_not_fit_is_refused_with_the_arithmetic() -> None:
    model = tiny_model("Llama 2").model
    n = sum(own.numel() for own in model.parameters())
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    require_room(model, torch.float32, {"": first}, "tiny", lambda device: (4 * n, 8 * n))
    with refused(ConfigurationError, "model.source", "tiny") as caught:
        require_room(model, torch.float32, {"": first}, "tiny", lambda device: (0, 4 * n - 1))
    for part in (f"{n / 1e9:.2f} billion parameters of 4 bytes", "on cuda:0", "cluster.gpus_per_replica=2"):
        assert part in str(caught.value)
    # What another process has there may go again; a GPU does not grow.
    with refused(OutOfMemory, "model.source", "tiny", says="are free"):
        require_room(model, torch.float32, {"": first}, "tiny", lambda device: (4 * n - 1, 8 * n))
    # In half the precision, or on two, it fits.
    require_room(model, torch.bfloat16, {"": first}, "tiny", lambda device: (2 * n, 2 * n))
    placed = device_map(model, [first, second])
    require_room(model, torch.float32, placed, "tiny", lambda device: (3 * n, 3 * n))
    with refused(ConfigurationError, "model.source", "tiny", says="on cuda:1"):
        require_room(model, torch.float32, placed, "tiny", lambda device: (4 * n, 4 * n) if device == first else (0, 0))
