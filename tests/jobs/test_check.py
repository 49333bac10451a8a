"""The command that says whether a model can be measured: what it prints, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from jobs.check import check
from jobs.entry import CONF
from neg_service.errors import ModelError
from tests.quantized_checkpoints import KINDS, make
from tests.refusals import refused
from tests.tiny_models import tiny_model


def checked(directory: Path, *settings: str) -> int:
    with initialize_config_dir(CONF, version_base="1.3"):
        return check(compose("check", overrides=[f"model.source={directory}", *settings]))


def saved(family: str, directory: Path) -> Path:
    model = tiny_model(family)
    model.model.save_pretrained(directory)
    model.tokenizer.save_pretrained(directory)
    return directory


def test_the_table_says_what_a_scan_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(saved("GPT-J", tmp_path)) == 0
    table = capsys.readouterr().out
    for line in (
        r"neurons +3 layers of 40 neurons; 120 in all\n",
        r"basis +paper: input of transformer\.h\.0\.mlp\.fc_out\n +hidden: input of transformer\.h\.0\.mlp\.fc_out\n",
        r"read at +last token\n",
        r"engine +kv_cache: a row is the last token, over keys and values that each row repeats\n",
        r" +not shared_prefix: 3 of the 3 layers do not go through transformers' attention interface\n",
        r"checked +rows of prompts of 13 tokens against the plain model, one by one\n",
        r" +what the down projections of 3 MLPs read against their activation",
        r"row logits +\d\.\de-\d\d off the plain forward pass, at most 0\.0001\n",
        r"small shifts +\d\.\de[-+]\d\d off what the gradient says, at most 0\.05\n",
        r"memory +\d+\.\d kB of weights; \d.* on cpu at the most so far\n",
    ):
        assert re.search(line, table), (line, table)


def test_a_gate_that_no_hook_sees_is_no_basis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(saved("LFM2", tmp_path), "json=true") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["engine"] == "recurrent_state"
    assert sorted(found["bases"]) == ["hidden", "paper"]


@pytest.mark.parametrize("asked", ["json=true", "job.log=json"])
def test_the_same_as_json(asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(saved("ModernBERT", tmp_path), asked, "model.dtype=bfloat16") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["engine"], found["read_at"], found["dtype"]) == ("full_sequence", "mask token", "bfloat16")
    assert found["bases"]["paper"] == "output of model.layers.0.mlp.Wi, from 40 on"
    assert found["deviations"]["finite_difference"] is None
    assert found["checked"][0] == "rows of prompts of 13 and 11 tokens against the plain model, one by one"
    assert found["weights_bytes"] == sum(weight.nbytes for weight in tiny_model("ModernBERT").model.parameters()) / 2


def test_quantised_weights_are_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantised, _ = make(KINDS["fp8 blocks"], tmp_path)
    assert checked(quantised) == 0
    said = r"weights +dequantised from fp8 \(14 tensors\); activations: quantised where it is served \(dynamic"
    assert re.search(said, capsys.readouterr().out)
    assert checked(quantised, "json=true") == 0
    found = json.loads(capsys.readouterr().out)["dequantised"]
    assert (found["method"], found["tensors"]) == ("fp8", 14)


def test_a_model_that_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with refused(ModelError, "model.source", says=r"no \*\.safetensors"):
        checked(tmp_path)
