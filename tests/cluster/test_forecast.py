"""What a scan is said to take: of replicas whose pieces take known times, whatever else the machine does."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from jobs.entry import composed
from jobs.scan import scan
from neg_service.cluster import forecast as module
from neg_service.cluster.forecast import forecast
from neg_service.cluster.messages import Shard, ShardResult
from neg_service.cluster.prepare import Prepared, prepare
from neg_service.cluster.replica import Replica
from neg_service.cluster.resources import Node, ReplicaSize
from neg_service.config import ScanConfig
from neg_service.errors import ConfigurationError, NegServiceError
from neg_service.prompts.prompt import EncodedPrompt
from tests.e2e.commands import scan_config
from tests.here import _loaded, run_here
from tests.refusals import refused

N_PROMPTS, N_NEURONS = 24, 120
AT_FIRST = 30.0


def seconds_of(prompt: EncodedPrompt, n_neurons: int) -> float:
    """What a prompt takes here on so many neurons."""
    return 0.4 + 0.1 * len(prompt.ids) + 0.1 * n_neurons


class Here:
    """Replicas in this process, in the place of Ray's actors: what is asked of one is done at once.

    They say that it took `seconds_of` its prompts, and `AT_FIRST` more the first time, as real ones do.
    """

    def __init__(self, make_worker: Callable[[], Any], destination: None, *_: Any) -> None:
        self._make_worker, self._destination = make_worker, destination

    def launch(self) -> Any:
        replica, done = Replica(self._make_worker, self._destination), []

        def run(shard: Shard, *more: Any) -> ShardResult:
            n_neurons = N_NEURONS if shard.neurons is None else len(shard.neurons.list)
            seconds = sum(seconds_of(prompt, n_neurons) for prompt in shard.prompts) + AT_FIRST * (not done)
            done.append(shard.index)
            return replace(replica.run(shard, *more), seconds=seconds, computed_seconds=seconds)

        calls = {"start": replica.start, "calibrate": replica.calibrate, "run": run}
        return SimpleNamespace(
            where=SimpleNamespace(remote=lambda: "here"),
            **{name: SimpleNamespace(remote=call) for name, call in calls.items()},
        )

    def end(self, actor: Any) -> None:
        pass


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of one processor, without Ray, so that one replica measures the sample."""
    monkeypatch.setattr(module, "RayActors", Here)
    for name in ("connect", "disconnect"):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    monkeypatch.setattr(module, "wait_for_size", lambda *_: ReplicaSize(1, 0, 1))
    monkeypatch.setattr(module, "nodes", lambda: [Node(1, 0, 8), Node(1, 0, 8)])
    monkeypatch.setattr(module, "_answers", lambda calls, *_: calls)
    monkeypatch.setattr("neg_service.cluster.replica.log_to_stderr", lambda *_, **__: None)
    monkeypatch.setattr("neg_service.cluster.worker.loaded", _loaded)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of 1 to 24 words, in no order of length, none of which begins as another does."""
    path = tmp_path_factory.mktemp("data") / "words.jsonl"
    rows = [
        {"prompt": " ".join(f"w{i * 2 + j % 2 + 1}" for j in range(i * 7 % N_PROMPTS + 1)), "targets": [" w3", " w4"]}
        for i in range(N_PROMPTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def arguments(tiny_directory: Path, dataset: Path, tmp_path: Path) -> list[str]:
    place = f"storage.uri={tmp_path / 'results'}"
    return [f"model.source={tiny_directory}", f"dataset.source={dataset}", "job.shard_size=8", place]


def _seconds_of_shards(prepared: Prepared, n_neurons: int) -> list[float]:
    plan = prepared.plan
    return [
        sum(seconds_of(prompt, n_neurons) for prompt in prepared.encoding[own.start : own.stop])
        for own in map(plan.places_of, range(plan.n_shards))
    ]


@pytest.mark.usefixtures("here")
def test_the_last_shard_is_one_replicas_and_a_warm_up_counts_once(arguments: list[str]) -> None:
    prepared = prepare(scan_config(*arguments))
    began = time.monotonic()
    found = forecast(prepared)
    took = time.monotonic() - began
    # Three shards on two replicas.
    first, second, third = _seconds_of_shards(prepared, N_NEURONS)
    takes = max(max(first, second), min(first, second) + third)
    assert (found.n_replicas, found.n_shards) == (2, 3)
    assert found.seconds - found.start_seconds == pytest.approx(takes, rel=0.05)
    assert found.low <= found.seconds <= found.high
    # What is not sampling a scan does, too, and its first shard takes as much longer as the first piece did.
    assert AT_FIRST < found.start_seconds < took + 1.02 * AT_FIRST
    assert 2 * takes < 1.05 * found.replica_seconds < 2.1 * (found.seconds - AT_FIRST + took)
    assert not Path(prepared.config.storage.uri).exists()
    assert found.n_bytes == pytest.approx(run_here(prepared).bytes_now, rel=0.1)


@pytest.mark.parametrize(("address", "n_replicas"), [(None, 2), ("head:6379", 3)])
@pytest.mark.usefixtures("here")
def test_replicas_without_room_count_where_nodes_may_come(
    arguments: list[str], address: str | None, n_replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    settings = [*arguments, "cluster.replicas.max=9", *([f"cluster.address={address}"] * bool(address))]
    # Of nine three have a shard, and the two nodes have room for two.
    assert module._replicas(prepare(scan_config(*settings)), ReplicaSize(1, 0, 1)) == (n_replicas, 1)


@pytest.mark.usefixtures("here")
def test_a_part_of_the_neurons_says_what_all_of_them_take(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neg_service.cluster.forecast._FIRST_NEURONS", 8)
    more = ["measure=sweep", "job.limit=2", "cluster.replicas.max=1"]
    prepared = prepare(scan_config(*arguments, *more))
    asked: list[float] = []
    with patch.object(module._Sampling, "_measure", _noting(asked)):
        found = forecast(prepared)
    # Two prompts of 13 s and 8 s to sample: a sixth of these for each piece, on two parts of each prompt's neurons.
    assert len(set(asked[-4:])) == 2
    assert max(asked[-4:]) < 0.25
    (takes,) = _seconds_of_shards(prepared, N_NEURONS)
    assert found.seconds - found.start_seconds == pytest.approx(takes, rel=0.05)
    assert found.n_bytes == pytest.approx(run_here(prepared).bytes_now, rel=0.2)


def _noting(asked: list[float]) -> Callable[..., Any]:
    measure = module._Sampling._measure

    def noted(self: Any, piece: Any) -> Any:
        asked.append(piece.share)
        return measure(self, piece)

    return noted


@pytest.mark.usefixtures("here")
def test_the_scan_that_ranks_neurons_first_counts_and_json_is_one_object(
    arguments: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "neg_service")
    more = ["measure=sweep", "neurons=top", "neurons.count=5", "neurons.over=dataset", "cluster.replicas.max=1"]
    settings = [*arguments, *more, "job.forecast=true", "job.price_per_hour=2.5", "job.log=json"]
    assert scan(composed("scan", settings, ScanConfig)) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    ranking = found["ranking"]
    assert found["money"] == pytest.approx(2.5 * found["replica_hours"])
    assert 0 < ranking["replica_hours"] < found["replica_hours"]
    assert 0 < ranking["hours"] < found["hours"]
    assert found["hours_low"] <= found["hours"] <= found["hours_high"]
    assert found["bytes"] == sum(found["bytes_of_table"].values()) + ranking["bytes"]
    assert list(ranking["bytes_of_table"]) == ["aggregate_importance"]
    assert "forecast: sample 1 of" in caplog.text


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_on_ray_a_forecast_tells_a_person_and_stores_nothing(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = [*arguments, "cluster.replicas.max=1", "job.forecast=true", "job.limit=2"]
    with patch.object(module, "disconnect"):
        assert scan(composed("scan", settings, ScanConfig)) == 0
    shown = capsys.readouterr().out
    for what in ("forecast of the whole scan", "to start, check the model, and end", "neurgrad", "nothing was stored"):
        assert what in shown
    assert "money" not in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_what_fails_in_a_replica_is_one_line(arguments: list[str]) -> None:
    # No replica loads a model in no time.
    settings = [*arguments, "cluster.replicas.max=1", "cluster.start_seconds=0", "job.forecast=true"]
    with patch.object(module, "disconnect"), refused(NegServiceError, says=r"waited 0 s .*\(cluster.start_seconds\)"):
        scan(composed("scan", settings, ScanConfig))


def test_what_makes_no_sense_is_refused(arguments: list[str]) -> None:
    with refused(ConfigurationError, "job.forecast", "true", says="job.dry_run does nothing"):
        scan(composed("scan", [*arguments, "job.forecast=true", "job.dry_run=true"], ScanConfig))
    with refused(ConfigurationError, "job.price_per_hour", "-1.0", allowed="0 or more"):
        scan(composed("scan", [*arguments, "job.forecast=true", "job.price_per_hour=-1"], ScanConfig))
