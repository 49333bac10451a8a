"""What a scan is said to take, and what it then takes: measures that sleep take the same on any machine."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from jobs.entry import composed
from jobs.scan import scan
from neg_service.cluster.forecast import forecast
from neg_service.cluster.prepare import prepare
from neg_service.config import ScanConfig
from neg_service.errors import ConfigurationError, NegServiceError
from tests.e2e.commands import scan_config
from tests.here import run_here
from tests.refusals import refused
from tests.slow_by_content import SECONDS_A_NEURON, SECONDS_A_PROMPT, SECONDS_A_TOKEN

pytestmark = pytest.mark.ray
N_PROMPTS = 24


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of 1 to 24 words, in no order of length, none of which begins as another does."""
    path = tmp_path_factory.mktemp("data") / "words.jsonl"
    lengths = [i * 7 % N_PROMPTS + 1 for i in range(N_PROMPTS)]
    rows = [
        {"prompt": " ".join(f"w{i * 2 + j % 2 + 1}" for j in range(length)), "targets": [" w3", " w4"], "id": f"{i}"}
        for i, length in enumerate(lengths)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def arguments(tiny_directory: Path, dataset: Path, tmp_path: Path, local_ray: None) -> list[str]:
    place = tmp_path / "results"
    return [
        f"model.source={tiny_directory}", f"dataset.source={dataset}", "job.shard_size=8", f"storage.uri={place}",
        "cluster.cpus_per_replica=1",
    ]  # fmt: skip


@pytest.mark.usefixtures("no_leaving")
def test_hours_and_bytes_of_neurgrad_on_two_replicas(arguments: list[str]) -> None:
    prepared = prepare(scan_config(*arguments, "measure.name=tests.slow_by_content:SlowByTokens"))
    found = forecast(prepared)
    assert (found.n_replicas, found.n_shards, found.sampled_seconds > 0) == (2, 3, True)
    # Three shards on two replicas: the first and the last, one after the other, or the second alone.
    shards = [
        sum(SECONDS_A_PROMPT + SECONDS_A_TOKEN * len(prompt.ids) for prompt in prepared.encoding[start : start + 8])
        for start in (0, 8, 16)
    ]
    alone = max(shards[:2])
    takes = max(alone, min(shards[:2]) + shards[2])
    assert found.seconds - found.start_seconds == pytest.approx(takes, rel=0.25)
    assert found.low <= found.seconds <= found.high
    assert found.replica_seconds > 2 * takes
    assert not Path(prepared.config.storage.uri).exists()
    assert sum(found.bytes_of_table.values()) == pytest.approx(run_here(prepared).bytes_now, rel=0.05)


@pytest.mark.usefixtures("no_leaving")
def test_a_part_of_the_neurons_says_what_all_of_them_take(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each prompt takes longer than a sample may take in all.
    monkeypatch.setattr("neg_service.cluster.forecast._FIRST_NEURONS", 8)
    monkeypatch.setattr("neg_service.cluster.sampling._LEAST_SECONDS", 3.0)
    measure = ["measure=sweep", "measure.name=tests.slow_by_content:SlowByNeurons", "job.limit=8", "job.shard_size=4"]
    prepared = prepare(scan_config(*arguments, *measure, "cluster.replicas.max=1"))
    found = forecast(prepared)
    prompts = [SECONDS_A_PROMPT + SECONDS_A_TOKEN * len(prompt.ids) for prompt in prepared.encoding]
    takes = sum(prompts) + 8 * 120 * SECONDS_A_NEURON
    assert found.seconds - found.start_seconds == pytest.approx(takes, rel=0.25)
    assert found.sampled_seconds < 0.5 * takes
    (sweep_rows,) = {120 * 2 * 8}
    assert found.bytes_of_table["sweep"] > 10 * sweep_rows


@pytest.mark.usefixtures("no_leaving")
def test_the_scan_that_ranks_neurons_first_counts_and_json_is_one_object(
    arguments: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "neg_service")
    more = ["measure=sweep", "neurons=top", "neurons.count=5", "neurons.over=dataset", "cluster.replicas.max=1"]
    settings = [*arguments, *more, "job.forecast=true", "job.price_per_hour=2.5"]
    assert scan(composed("scan", [*settings, "job.log=json"], ScanConfig)) == 0
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


@pytest.mark.usefixtures("no_leaving")
def test_a_forecast_tells_a_person_and_what_the_scan_would_refuse_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert scan(composed("scan", [*arguments, "job.forecast=true", "job.limit=2"], ScanConfig)) == 0
    shown = capsys.readouterr().out
    for what in ("forecast of the whole scan", "to start, check the model, and end", "neurgrad", "nothing was stored"):
        assert what in shown
    assert "money" not in shown
    with refused(ConfigurationError, "job.forecast", "true", says="job.dry_run does nothing"):
        scan(composed("scan", [*arguments, "job.forecast=true", "job.dry_run=true"], ScanConfig))
    with refused(ConfigurationError, "job.price_per_hour", "-1.0", allowed="0 or more"):
        scan(composed("scan", [*arguments, "job.forecast=true", "job.price_per_hour=-1"], ScanConfig))
    measure = "measure.name=tests.slow_by_content:Nothing"
    with pytest.raises(NegServiceError):
        scan(composed("scan", [*arguments, "job.forecast=true", measure], ScanConfig))


@pytest.fixture
def no_leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's Ray stays for the next test."""
    monkeypatch.setattr("neg_service.cluster.forecast.disconnect", lambda: None)
