"""Files that a person writes by hand, one of every kind, and what reads each."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from neg_service.config import DatasetConfig, NeuronsConfig
from neg_service.errors import NegServiceError
from neg_service.measures.choice import with_list_read
from neg_service.measures.edits import checked_edits, read_edits
from neg_service.prompts.mceval8k import load_tasks
from neg_service.prompts.prompt import Prompt, check_prompts
from neg_service.prompts.sources import load_prompts
from neg_service.prompts.tasks import TASKS
from neg_service.prompts.templates import templates_of
from tests.skills import published_row


def prompts_in(place: Path) -> list[Prompt]:
    prompts = load_prompts(str(place))
    check_prompts(prompts)
    return prompts


def list_in(place: Path) -> Any:
    return with_list_read(NeuronsConfig(choose="list", list=str(place))).list.tolist()


def edits_in(place: Path) -> Any:
    edits = read_edits(str(place))
    checked_edits(edits, [40] * 3)
    return edits


def rows_in(place: Path) -> list[Prompt]:
    """Of the task whose published file this is."""
    (place.parent / "classification/agnews").mkdir(parents=True)
    place.rename(place.parent / "classification/agnews/valid.json")
    return load_tasks(DatasetConfig(source=str(place.parent), task="agnews", shots=0))


def wordings_in(place: Path) -> Any:
    return templates_of(TASKS["agnews"], str(place)).get("mine")


def outcome(read: Callable[..., Any], *given: Any) -> Any:
    """What is read, or the project's own error; any other goes on."""
    try:
        return read(*given)
    except NegServiceError as error:
        return error


WORDING = '[mine.en]\ninstruction = "é\u2028"\nquestion = "{text}?"\nlabels = [" a", " b", " c", " d"]\n'
TASK_ROWS = json.dumps([published_row("agnews", n) for n in range(4)])
# A whole file of every kind that a person writes by hand, by what reads it.
TEXTS: list[tuple[str, str, Callable[[Path], Any]]] = [
    ("a.jsonl", '{"prompt": "a\u2028é", "targets": [" b"]}\n{"prompt": "c\x85", "targets": [" d"]}\n', prompts_in),
    ("a.csv", 'prompt,targets\na\u2028é,"["" b""]"\n', prompts_in),
    ("n.csv", "layer,neuron,what\n1,2,é\u2028x\n", list_in),
    ("n.jsonl", '{"layer": 1, "neuron": 2, "what": "é\u2028\x85"}\n{"layer": 1, "neuron": 3}\n', list_in),
    ("e.json", '[{"neurons": [[0, 1]], "scale": 0, "name": "é\u2028"}]', edits_in),
    ("e.jsonl", '{"neurons": [[0, 1]], "scale": 0, "name": "é\u2028x\x85y"}\n', edits_in),
    ("t.json", TASK_ROWS[:-1] + ', {"text": "é\u2028", "label": 0}]', rows_in),
    ("w.toml", WORDING, wordings_in),
]


def parquet_file(**how: Any) -> tuple[bytes, list[dict[str, Any]]]:
    """Rows that are prompts and neurons at once, as a file and as they are."""
    rows = [
        {"prompt": f"w{i}", "targets": [" b", f" c{i}"], "id": f"i{i}", "layer": i % 3, "neuron": 7 * i % 40}
        for i in range(30)
    ]
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), content, **how)
    return content.getvalue(), rows
