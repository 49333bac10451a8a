"""Prompts on disk are the prompts that were put there, and memory does not grow with their texts."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from neg_service.config import DatasetConfig
from neg_service.errors import PromptError
from neg_service.prompts.prompt import Prompt, check_prompts
from neg_service.prompts.sources import load_dataset, load_prompts
from neg_service.prompts.store import PromptFile
from tests.refusals import refused

# More than a block, with texts that no encoding may change: of many bytes a letter, and a lone surrogate.
PROMPTS = [Prompt(f"p{i}", f"{i} é 字 \ud800\n", (" a", f" b{i}"), None if i % 2 else 1) for i in range(2503)]


def test_what_is_read_is_what_was_written() -> None:
    stored = PromptFile(iter(PROMPTS))
    assert len(stored) == len(PROMPTS)
    assert list(stored) == PROMPTS
    assert stored[0] == PROMPTS[0]
    assert stored[-1] == PROMPTS[-1]
    for part in (
        slice(5, 9),
        slice(2500, None),
        slice(3, 3),
        slice(9, 3),
        slice(None, None, 500),
        slice(None, None, -1),
    ):
        assert stored[part] == PROMPTS[part]
    with pytest.raises(IndexError):
        stored[len(PROMPTS)]
    assert list(PromptFile([])) == []


def test_several_threads_may_read() -> None:
    stored = PromptFile(PROMPTS)
    with ThreadPoolExecutor(4) as pool:
        assert all(found == PROMPTS for found in pool.map(lambda _: list(stored), range(8)))


def rows(path: Path, n: int, letters: int) -> str:
    with path.open("w") as file:
        for i in range(n):
            row = {"prompt": f"{i} " + "x" * letters, "targets": [" a", " b"], "answer": " a"}
            file.write(json.dumps(row) + "\n")
    return str(path)


# In a process of its own: what threads of other tests allocate meanwhile is no prompt's.
MEASURED = """
import gc, json, sys, tracemalloc
from neg_service.config import DatasetConfig
from neg_service.prompts.prompt import check_prompts, digest
from neg_service.prompts.sources import load_dataset
few, *sources = sys.argv[1:]
# What libraries keep when they are used for the first time is no prompt's.
check_prompts(load_dataset(DatasetConfig(source=few)))
for source in sources:
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    prompts = load_dataset(DatasetConfig(source=source))
    check_prompts(prompts)
    digest(prompts)
    gc.collect()
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(json.dumps([len(prompts), after - before, peak - before]))
"""


def test_a_data_set_takes_offsets_and_not_its_texts(tmp_path: Path) -> None:
    n, lengths = 3000, (100, 2000)
    sources = [rows(tmp_path / f"{letters}.jsonl", n, letters) for letters in lengths]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, rows(tmp_path / "few.jsonl", 3, 100), *sources],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for letters, line in zip(lengths, done.stdout.splitlines(), strict=True):
        count, kept, peak = json.loads(line)
        assert count == n
        # Eight bytes of a prompt, give or take how arrays grow.
        assert kept < 20 * n + 50_000
        # A block of prompts at once, and their lines; the file has 6 MB in the second case.
        assert peak < 4 * 1000 * (letters + 500)


def test_a_repeated_id_is_named_and_so_is_the_first_of_several(tmp_path: Path) -> None:
    prompts = [Prompt(name, "x", (" a",)) for name in ("1", "2", "3", "3", "2")]
    for own in (prompts, PromptFile(prompts)):
        with refused(PromptError, "dataset.source", says="prompt id '3' appears twice"):
            check_prompts(own)


@pytest.mark.parametrize("limit", [1, None])
def test_targets_are_found_among_the_answers_of_all_rows_also_of_those_before(
    limit: int | None, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    given = [{"prompt": "p", "targets": [" own", " other"]}] * 2
    alone = [{"prompt": f"q{i}", "answer": answer} for i, answer in enumerate("abcd")]
    path.write_text("".join(json.dumps(row) + "\n" for row in [alone[0], *given, *alone[1:]]))
    found = load_prompts(str(path), limit)
    assert sorted(found[0].targets) == [" a", " b", " c", " d"]
    assert found[0].targets[found[0].answer or 0] == " a"
    if limit is None:
        assert len(found) == 6
        assert found[1].targets == (" own", " other")


def test_a_broken_line_beyond_the_limit_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "targets": [" a"]}\n{"prompt": 1}\n{"prompt": \n')
    with refused(PromptError, "dataset.source", says="line 3 is not JSON"):
        load_dataset(DatasetConfig(source=str(path)), 1)
