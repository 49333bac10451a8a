"""What is done before Ray starts, and not again: encoding, and planning the scan that ranks neurons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jobs import descriptions
from jobs.descriptions import describe_plan
from neg_service.cluster import inputs as preparing
from neg_service.cluster import scan
from neg_service.cluster.driver import Outcome
from neg_service.cluster.prepare import Prepared, prepare
from neg_service.cluster.progress import Progress
from neg_service.config import ScanConfig, typed
from neg_service.errors import PromptError
from neg_service.prompts.tokens import encode
from neg_service.storage.parts import encode_part, part_key
from tests.refusals import refused
from tests.tiny_models import tiny_model


class Stop(Exception):
    """Ray would start here."""


@pytest.fixture
def asked(tiny_directory: Path, tmp_path: Path) -> dict[str, Any]:
    words = tmp_path / "words.jsonl"
    words.write_text("".join(f'{{"prompt": "w{i} w2", "targets": [" w3", " w4"]}}\n' for i in range(9)))
    return {
        "model": {"source": str(tiny_directory)},
        "dataset": {"source": str(words)},
        "job": {"shard_size": 2},
        "storage": {"uri": str(tmp_path / "results")},
    }


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the prompts that were encoded so far."""
    found: list[str] = []

    def counting(tokenizer: Any, prompts: Any, *more: Any, **named: Any) -> Any:
        prompts = list(prompts)
        found.extend(prompt.id for prompt in prompts)
        return encode(tokenizer, prompts, *more, **named)

    monkeypatch.setattr(preparing, "encode", counting)
    return found


@pytest.mark.parametrize("settings", [{}, {"too_long": "skip"}, {"not_one_token": "skip", "too_long": "skip"}])
def test_each_prompt_is_encoded_once_before_ray_starts(
    asked: dict[str, Any], encoded: list[str], settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def connected(*_: Any) -> Iterator[None]:
        raise Stop
        yield

    monkeypatch.setattr(scan, "_connected", connected)
    prepared = prepare(typed(ScanConfig, {**asked, "dataset": {**asked["dataset"], **settings}}))
    with pytest.raises(Stop):
        scan.run(prepared)
    assert sorted(encoded) == [f"{i:06d}" for i in range(9)]
    assert [one.ids for one in prepared.encoding] == [one.ids for one in prepared.encoding[:]]
    assert len(encoded) == 9


def test_a_run_that_goes_on_encodes_what_is_left_when_it_is_its_turn(
    asked: dict[str, Any], encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def connected(*_: Any) -> Iterator[None]:
        yield

    def executed(prepared: Prepared, place: Any) -> scan._Executed:
        assert encoded == []
        shards = scan.shards_of(prepared.encoding, prepared.plan, {0, 2, 3})
        assert [prompt.prompt.id for prompt in next(shards).prompts] == ["000002", "000003"]
        assert encoded == ["000002", "000003"]
        assert [len(shard.prompts) for shard in shards] == [1]
        return scan._Executed(Outcome(), Progress(9, 0, 1.0))

    monkeypatch.setattr(scan, "_connected", connected)
    monkeypatch.setattr(scan, "_execute", executed)
    prepared = prepare(typed(ScanConfig, asked))
    scan._begin(prepared, scan.open_store(prepared.uri))
    scan.run(prepared)
    assert encoded == ["000002", "000003", "000008"]


def test_what_a_run_of_longer_targets_found_right_is_refused_by_a_command_that_takes_single_tokens(
    asked: dict[str, Any], encoded: list[str]
) -> None:
    longer = Path(asked["dataset"]["source"]).with_name("longer.jsonl")
    longer.write_text('{"prompt": "w1 w2", "targets": [" w3 w4", " w4"], "id": "long"}\n')
    asked["dataset"]["source"] = str(longer)
    sequences = {**asked["dataset"], "not_one_token": "sequence"}
    prepared = prepare(typed(ScanConfig, {**asked, "dataset": sequences}))
    directory = scan._open(prepared).directory
    scan._begin(prepared, directory.store)
    for name, schema in prepared.tables.items():
        part = encode_part(name, schema.empty_table(), prepared.fingerprint, 0)
        directory.store.put(part_key(name, 0), part)
    # Done by either, as single tokens would be.
    single = prepare(typed(ScanConfig, asked))
    assert single.uri == prepared.uri
    with refused(PromptError, "dataset.source", says="prompt 'long': target ' w3 w4' is 2 tokens"):
        scan.run(single)
    before = len(encoded)
    assert scan.run(prepare(typed(ScanConfig, {**asked, "dataset": sequences}))).shards_before == 1
    assert len(encoded) == before


def test_a_plan_looks_at_the_first_rows(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(typed(ScanConfig, asked))
    assert "checked    all rows with their targets" in describe_plan(prepared)
    monkeypatch.setattr(descriptions, "_ROWS_CHECKED", 8)
    assert "checked    the first 8 rows with their targets; the others when it starts" in describe_plan(prepared)
    file = Path(asked["dataset"]["source"])
    for row, says in (
        ('{"prompt": "w1", "targets": [" w3 w4"]}', "is 2 tokens"),
        ('{"prompt": "w1", "targets": [""]}', "is 0 tokens"),
        ('{"prompt": "w1 w1", "targets": [" w3"], "at": "w1"}', "2 times"),
    ):  # fmt: skip
        file.write_text(f"{row}\n")
        with refused(PromptError, says=says):
            describe_plan(prepare(typed(ScanConfig, asked)))


def test_the_scan_that_ranks_neurons_is_planned_and_shown(asked: dict[str, Any]) -> None:
    top = {"choose": "top", "count": 3, "over": "dataset"}
    prepared = prepare(typed(ScanConfig, {**asked, "measure": {"name": "sweep"}, "neurons": top}))
    assert prepared.ranking is not None
    assert prepared.ranking.config.measure["name"] == "aggregate_importance"
    assert prepared.ranking.uri != prepared.uri
    # A gradient for each target, and the same prompts, which are encoded once for both.
    assert prepared.ranking.plan.n_rows == 18
    assert prepared.ranking.encoding is prepared.encoding
    (line,) = [line for line in describe_plan(prepared).splitlines() if line.strip().startswith("ranking")]
    assert "18 gradients, 1 shards" in line
    assert prepared.ranking.uri in line
    assert prepare(typed(ScanConfig, asked)).ranking is None


def test_a_plan_says_by_which_engine_and_how_much_work_a_row_is(asked: dict[str, Any], tmp_path: Path) -> None:
    def engine(source: Path) -> str:
        prepared = prepare(typed(ScanConfig, {**asked, "model": {"source": str(source)}}))
        (line,) = [line for line in describe_plan(prepared).splitlines() if line.strip().startswith("engine")]
        return line.split("engine", 1)[1].strip()

    said = (
        "differences, unless the self-check chooses another: a row is the last token's difference from the row without"
    )
    assert engine(Path(asked["model"]["source"])).startswith(said)
    model = tiny_model("Doge")
    # No engine but that of whole sequences takes blocks of tokens.
    model.model.config.attention_type = "block_sparse"
    model.model.save_pretrained(tmp_path / "blocks")
    model.tokenizer.save_pretrained(tmp_path / "blocks")
    assert engine(tmp_path / "blocks") == (
        "full_sequence, unless the self-check chooses another: a row is a whole prompt, of 2 tokens: so many times the "
        "work of a row of one token"
    )
