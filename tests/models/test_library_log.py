"""What libraries warn of reaches our log: each text once, as one line."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

import neg_service
from neg_service.models.library_log import hear_libraries
from tests.fakes import save_tiny_model


def test_a_warning_is_told_once_in_one_line(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    hear_libraries()
    hear_libraries()
    library = transformers_logging.get_logger("transformers.some.where")
    for length in (700, 800):
        library.warning(f"\x1b[1mTheir\x1b[0m sequence is longer:\n  {length} tokens")
    library.info("of no interest")
    logging.getLogger("huggingface_hub.file_download").warning("The file is stale.")
    logging.getLogger("huggingface_hub.utils").warning("Retrying in 2s [Retry 1/5].")
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("neg_service")]
    assert ours == [
        "transformers: Their sequence is longer: 700 tokens",
        "huggingface_hub: The file is stale.",
    ]
    assert capfd.readouterr().err == ""


def test_what_transformers_warns_of_a_model_reaches_a_person(tmp_path: Path) -> None:
    # A head of its own, although the configuration ties it to the embeddings.
    directory = save_tiny_model(tmp_path, lambda model: setattr(model.config, "tie_word_embeddings", True))
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = head = 1.1 * tensors["model.embed_tokens.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    done = subprocess.run(
        [sys.executable, "-m", "jobs.check", f"model.source={directory}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    told = [line for line in done.stderr.splitlines() if "tied weights mapping" in line]
    assert len(told) == 1
    assert " W transformers: The tied weights mapping and config for this model" in told[0]
    assert torch.equal(neg_service.load_model(directory).model.lm_head.weight, head)
