"""How many prompts a shard holds where nobody says it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neg_service.cluster import scan, shard_size
from neg_service.cluster.prepare import prepare, prepare_again, tell_of_better_shards
from neg_service.cluster.ranking import ranking_of
from neg_service.cluster.shard_size import (
    ACCELERATOR_SPEED,
    CPU_SPEED,
    FEWEST_SHARDS,
    LEAST_PROMPTS,
    MESSAGE_BYTES,
    SHARD_BYTES,
    automatic_shard_size,
    multiplications,
    plans_for_accelerator,
    texts_of,
)
from neg_service.config import ClusterConfig, DatasetConfig, ModelConfig, NeuronsConfig, ScanConfig, StorageConfig
from neg_service.errors import DestinationError
from neg_service.measures.base import Cost
from neg_service.prompts.prompt import Prompt
from neg_service.storage.reader import Run, open_run
from neg_service.storage.stores import open_store
from tests.refusals import refused
from tests.shards import INFO

# A hundred million weights in the layers, a quarter as many in the head.
SMALL = replace(INFO, n_parameters=100_000_000, token_weights=100_000_000, head_weights=25_000_000)
# 40 bytes, and nothing that they share: ten tokens each.
PROMPTS = [Prompt(f"{i}", f"{i:05d}" + "x" * 35, (" a",)) for i in range(20_000)]


def cost(rows: float, n_bytes: int = 0, passes: float = 2.0) -> Cost:
    return Cost({"t": n_bytes}, rows, passes=passes)


def size(n: int, own: Cost, has_accelerator: bool = False, info: Any = SMALL) -> int:
    return automatic_shard_size(PROMPTS[:n], info, own, has_accelerator)


def test_work_is_counted_in_tokens_through_all_layers_and_rows_with_the_head() -> None:
    prompts = [Prompt("0", "abcdefgh", ()), Prompt("1", "abcdwxyz", ()), Prompt("2", "abcdefgh", ())]
    texts = texts_of(prompts)
    # Sorted they are abcdefgh twice and abcdwxyz: of 24 bytes 8 and then 4 were there before.
    assert (texts.bytes, texts.own_bytes) == (8, (24 - 8 - 4) / 3)
    info = replace(INFO, token_weights=1000, head_weights=10)
    # One token is a prompt's own; three rows run there and back, a half is a row from the middle layer on.
    assert multiplications(info, cost(3), texts) == 1 * 1000 + 3 * 2 * 1010
    assert multiplications(info, cost(3, passes=0.5), texts) == 1 * 1000 + 3 * 0.5 * 1010
    # Where a row is a whole prompt, nothing is shared: both tokens run for each.
    assert multiplications(replace(info, rows_are_prompts=True), cost(3), texts) == 3 * 2 * (2 * 1000 + 10)
    # Equal prompts have a token of their own each.
    assert texts_of(prompts[:1] * 500).own_bytes == 4


def test_a_shard_is_half_a_minute_of_the_kind_of_replica_that_is_asked_for() -> None:
    for speed, has_accelerator in ((CPU_SPEED, False), (ACCELERATOR_SPEED, True)):
        # A quarter of a second, a little less than all of it in the rows.
        rows = speed / 4 / 62.5e6
        own = cost(rows, passes=0.5)
        assert 100 <= size(20_000, own, has_accelerator) <= 120
        assert size(20_000, cost(8 * rows, passes=0.5), has_accelerator) == pytest.approx(15, abs=1)
        # One prompt is the least that a shard can hold.
        assert size(20_000, cost(1000 * rows, passes=0.5), has_accelerator) == 1
    assert size(20_000, cost(1), has_accelerator=True) > 20 * size(20_000, cost(200), has_accelerator=False)


def test_neither_results_nor_the_message_to_a_replica_become_too_large() -> None:
    assert size(20_000, cost(1, SHARD_BYTES // 7)) == 7
    assert size(20_000, cost(1, 10 * SHARD_BYTES)) == 1
    # What is kept of each prompt until all of the shard are measured counts as results do.
    assert size(20_000, replace(cost(1), held=SHARD_BYTES // 7)) == 7
    long = [Prompt("0", "x" * 100_000, ())] * 1000
    assert automatic_shard_size(long, SMALL, cost(1e-9), has_accelerator=True) == MESSAGE_BYTES // 200_256
    worded = [Prompt("0", "x" * 1000, (), wordings=(("y" * 1000, None),) * 20)] * 10_000
    sent = 256 + 2 * 1000 + 20 * (256 + 2 * 1000)
    assert automatic_shard_size(worded, SMALL, cost(1e-9), has_accelerator=True) == MESSAGE_BYTES // sent


def test_a_small_data_set_still_has_several_shards() -> None:
    # Work of milliseconds: as many shards of 64 prompts as there are.
    assert [size(n, cost(1), has_accelerator=True) for n in (3, 64, 316)] == [3, 64, LEAST_PROMPTS]
    # Two minutes of work, of which half a minute would make four shards.
    rows = CPU_SPEED / 2.5 / 62.5e6
    n = size(300, cost(rows, passes=0.5))
    assert n == -(-300 // FEWEST_SHARDS)
    # A prompt of a second: three make a shard, however few there are.
    assert size(20, cost(2.4 * rows, passes=0.5)) == 3


def test_the_kind_of_replica_is_what_the_settings_say_else_what_models_of_the_size_need() -> None:
    large = replace(SMALL, n_parameters=3 * 10**9)

    def planned(info: Any, device: Any = "auto", **cluster: Any) -> bool:
        config = ScanConfig(model=ModelConfig(device=device), cluster=ClusterConfig(**cluster))
        return plans_for_accelerator(config, info)

    assert [planned(info) for info in (SMALL, large)] == [False, True]
    assert [planned(info, gpus_per_replica=0) for info in (SMALL, large)] == [False, False]
    assert [planned(info, gpus_per_replica=0.25) for info in (SMALL, large)] == [True, True]
    assert [planned(info, device="cpu") for info in (SMALL, large)] == [False, False]
    assert [planned(info, device="cuda:0,cuda:1") for info in (SMALL, large)] == [True, True]
    # Neither speed nor number: a run goes on with other replicas.
    assert not planned(SMALL, cpus_per_replica=64, replicas=100)


@pytest.fixture
def config(tiny_directory: Path, tmp_path: Path) -> ScanConfig:
    """NeurGrad of 40 prompts."""
    words = tmp_path / "words.jsonl"
    words.write_text("".join(f'{{"prompt": "w{i} w2", "targets": [" w3", " w4"]}}\n' for i in range(40)))
    found = ScanConfig(ModelConfig(str(tiny_directory)), DatasetConfig(str(words)))
    found.storage = StorageConfig(str(tmp_path / "results"))
    return found


def begun_by_another_rule(config: ScanConfig, patch: pytest.MonkeyPatch, **about: str) -> Run:
    """A run that an earlier version began, whose `auto` was 16 prompts."""
    with patch.context() as earlier:
        earlier.setattr("neg_service.cluster.prepare.automatic_shard_size", lambda *given: 16)
        prepared = prepare(config)
    scan._begin(replace(prepared, about=about), open_store(prepared.uri))
    return open_run(prepared.uri)


def test_a_run_of_another_rule_goes_on_by_its_uri(config: ScanConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun_by_another_rule(config, monkeypatch)
    assert prepare(config).uri != run.uri
    resumed = replace(config, job=replace(config.job, resume=run.uri))
    for again in (prepare(resumed), prepare_again(run, ScanConfig())):
        assert (again.uri, again.fingerprint, again.plan.n_shards) == (run.uri, run.fingerprint, 3)
    # What is said stays said.
    with refused(DestinationError, says="plan.shard_size: 16 there, 5 asked"):
        prepare(replace(config, job=replace(resumed.job, shard_size=5)))


def test_its_ranking_goes_on_too(config: ScanConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, neurons=NeuronsConfig(choose="top", count=3, over="dataset"))
    config.measure = {"name": "sweep", "shifts": [-1.0, 1.0]}
    ranked = begun_by_another_rule(ranking_of(config), monkeypatch)
    first = begun_by_another_rule(config, monkeypatch, ranked_by=ranked.uri)
    again = prepare(replace(config, job=replace(config.job, resume=first.uri)))
    assert again.ranking is not None
    assert (again.uri, again.ranking.uri) == (first.uri, ranked.uri)
    # Where the ranking is gone, it is made anew.
    Path(ranked.uri, "run.json").unlink()
    Path(ranked.uri, "run.copy.json").unlink()
    anew = prepare(replace(config, job=replace(config.job, resume=first.uri))).ranking
    assert anew is not None
    assert anew.plan.shard_size == 40


def test_replicas_of_another_kind_than_was_planned_for_are_told_of(
    config: ScanConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "neg_service")
    # So slow that the kinds differ with a tiny model.
    monkeypatch.setattr(shard_size, "CPU_SPEED", 1e4)
    prepared = prepare(config)
    tell_of_better_shards(prepared, has_accelerator=False)
    assert not caplog.messages
    tell_of_better_shards(prepared, has_accelerator=True)
    size = prepared.plan.shard_size
    assert size < 40
    assert caplog.messages == [
        f"shards of {size} prompts are sized for replicas without an accelerator, and these are with one: "
        "cluster.gpus_per_replica=1 begins another run, with shards of 40"
    ]
    for job in ({"shard_size": size}, {"resume": "elsewhere"}, {"extend": "elsewhere"}):
        told = replace(prepared, config=replace(config, job=replace(config.job, **job)))
        tell_of_better_shards(told, has_accelerator=True)
    assert len(caplog.messages) == 1
