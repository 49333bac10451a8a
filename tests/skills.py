"""Rows in the layout of MCEval8K, scans without a cluster, and a tiny model in which known neurons carry a label."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from neg_service.config import DatasetConfig, ModelConfig, ScanConfig, StorageConfig
from neg_service.prompts.tasks import LANGUAGES, TASKS
from neg_service.studies.scans import StudyScans
from tests.fakes import save_tiny_model
from tests.here import scan_here

# Where the planted model has its skill, as (layer, neuron), with the sign of the neuron's influence on the right label.
PLANTED = {(0, 3): 1, (0, 17): -1, (2, 5): 1}
# Words that say label 0 and label 1.
_SIGNS = (range(10, 50), range(50, 90))


def published_row(task: str, number: int) -> dict[str, Any]:
    """A row as MCEval8K publishes it; its right label goes round with the number."""
    n, language = TASKS[task].n_labels, LANGUAGES[number // TASKS[task].n_labels % 5]
    label = number % n
    options = [f"option {i} of {number}" for i in range(n)]
    text = {"text": f"text {number} of {task}"}
    if task == "clang8":
        return {"sentence1": f"good {number}", "sentence2": f"bad {number}", "acceptable": label}
    if task == "fever":
        return {"claim": f"claim {number}", "label": label}
    if task == "amazon-reviews":
        return text | {"label": float(label + 1)}
    if task == "amazon-review-multi":
        return {"review": f"review {number}", "label": label + 1, "lang": language}
    if task == "lti":
        return text | {"lang": LANGUAGES[label]}
    if task == "paws":
        return {"sentence1": f"first {number}", "sentence2": f"second {number}", "label": label}
    if task in ("mnli", "xnli"):
        return {"premise": f"premise {number}", "hypothesis": f"so {number}", "label": label, "lang": language}
    if task == "halueval":
        return {"knowledge": "k", "dialogue": "d", "response": f"response {number}", "hallucination": label}
    if task == "toxicity":
        return text | {"toxic": label}
    if task == "stereoset":
        kinds = {"stereotype": label, "anti-stereotype": (label + 1) % 3, "non-stereotype": (label + 2) % 3}
        return {"context": f"context {number}", "sentences": options, **kinds}
    if task in ("ner", "chunking"):
        return text | {"target_chunk": ["New", "York"], "options": options, "label": label}
    if task in ("postag", "mpostag"):
        return text | {"target_token": "word", "options": options, "label": label, "lang": language}
    if task in ("agnews", "imdb"):
        return text | {"label": label}
    return text | {"options": options, "label": label, "lang": language}


def write_split(place: Path, task: str, split: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A published file."""
    file = place / TASKS[task].path(split)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(list(rows)))


def write_all(place: Path, count: int = 60) -> Path:
    """All tasks and splits."""
    for task in TASKS:
        for i, split in enumerate(("train", "valid", "test")):
            write_split(place, task, split, [published_row(task, i * 1000 + number) for number in range(count)])
    return place


def planted_model(place: Path) -> Path:
    """A tiny Llama whose neurons see nothing of the label but the planted ones, which turn it into the right answer.

    Attention adds nothing, so the last word alone counts. Words that say a label differ in one direction of their
    embeddings, which only planted neurons read and write towards the labels, each with its sign.
    """

    def plant(model: Any) -> None:
        assert isinstance(model, LlamaForCausalLM)
        torch.manual_seed(1)
        size = model.config.hidden_size
        basis = torch.linalg.qr(torch.randn(size, size)).Q
        sign, answer, always, others = basis[:, 0], basis[:, 1], basis[:, 2], basis[:, 3:]
        project = others @ others.T
        embeddings, head = model.model.embed_tokens.weight, model.lm_head.weight
        embeddings.data = torch.randn_like(embeddings) @ project + 2.0 * always
        head.data = 0.3 * torch.randn_like(head) @ project
        for label, words in enumerate(_SIGNS):
            embeddings.data[list(words)] += (2.0 if label == 0 else -2.0) * sign
        head.data[7] += answer
        head.data[8] -= answer
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight.data.zero_()
            for weights in (layer.mlp.up_proj.weight, layer.mlp.gate_proj.weight):
                weights.data = 0.5 * torch.randn_like(weights) @ project
            layer.mlp.down_proj.weight.data = project @ torch.randn_like(layer.mlp.down_proj.weight) * 0.3
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.data.fill_(1)
            for (own, neuron), polarity in PLANTED.items():
                if own == i:
                    layer.mlp.up_proj.weight.data[neuron] = sign
                    layer.mlp.gate_proj.weight.data[neuron] = always
                    layer.mlp.down_proj.weight.data[:, neuron] = polarity * answer
        model.model.norm.weight.data.fill_(1)

    return save_tiny_model(place, plant)


def planted_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows of `imdb` whose last word says the label."""
    draw = torch.Generator().manual_seed(start)
    rows = []
    for number in range(count):
        before = torch.randint(10, 90, (3,), generator=draw).tolist()
        word = _SIGNS[number % 2][int(torch.randint(40, (1,), generator=draw))]
        rows.append({"text": " ".join(f"w{i}" for i in [*before, word]), "label": number % 2})
    return rows


PLANTED_WORDINGS = """
[default.en]
instruction = "w1"
question = "{text}"
labels = [" w7", " w8"]

[other.en]
instruction = "w2 w3"
question = "w4 {text}"
labels = [" w7", " w8"]

# The last word alone counts in the planted model: here it says nothing.
[blind.en]
instruction = "w1"
question = "{text} w95"
labels = [" w7", " w8"]
"""


def scans_here(model: Path, dataset: DatasetConfig, results: Path) -> StudyScans:
    """The scans of a study in this process, of tasks in `dataset`."""
    settings = ScanConfig(
        model=ModelConfig(source=str(model)), dataset=dataset, storage=StorageConfig(uri=str(results))
    )  # fmt: skip
    return StudyScans(settings, scan_here)
