"""Forecasts against the scans that they are of, by the clock: on a machine that nothing else uses, or it tells of that.

Not in `make test`: `python -m pytest tests/e2e/test_forecast.py -m timing`. A forecast is made before and after each
scan, because machines change their pace; their mean has to be within a quarter of what the command took.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.e2e.commands import job
from tests.mixtures import tiny_mixture
from tests.tiny_models import tiny_tokenizer

pytestmark = [pytest.mark.timing, pytest.mark.ray, pytest.mark.model]
EDITS = "[{neurons: [[29,864],[20,1011]], scale: 0}, {neurons: [[5,864]], shift: 0.5}]"
ONE, TWO = (["cluster.cpus_per_replica=1", f"cluster.replicas.max={n}"] for n in (1, 2))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param([*ONE, "job.limit=200"], id="neurgrad"),
        pytest.param([*TWO, "job.limit=200", "job.shard_size=40"], id="neurgrad on two replicas"),
        pytest.param([*ONE, "job.limit=20", "measure=sweep", "neurons=sample", "neurons.count=10"], id="sweep"),
        pytest.param([*ONE, "job.limit=8", "measure=integrated_gradients"], id="integrated gradients"),
        pytest.param([*ONE, "measure=intervene", f"measure.edits={EDITS}"], id="intervene"),
        pytest.param([*ONE, "measure=sweep", "mixture"], id="mixture"),
    ],
)
def test_a_forecast_is_within_a_quarter_of_the_scan(settings: list[str], tmp_path: Path) -> None:
    if settings[-1] == "mixture":
        settings = [*settings[:-1], *_mixture(tmp_path)]
    place = tmp_path / "results"
    asked = [*settings, f"storage.uri={place}"]
    before = _forecast(asked)
    assert not place.exists()
    began = time.monotonic()
    done = job("scan", *asked)
    took = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    after = _forecast(asked)
    said = 3600 * (before["hours"] + after["hours"]) / 2
    stored = sum(part.stat().st_size for part in place.rglob("*.parquet"))
    assert said == pytest.approx(took, rel=0.25), (before, after)
    assert before["bytes"] == pytest.approx(stored, rel=0.25)


def _forecast(asked: list[str]) -> dict[str, float]:
    done = job("scan", *asked, "job.forecast=true", "job.log=json")
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _mixture(place: Path) -> list[str]:
    model, words = place / "model", place / "words.jsonl"
    tiny_mixture("Mixtral").model.save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    rows = [
        {"prompt": " ".join(f"w{(i * 7 + j) % 90 + 1}" for j in range(i % 30 + 1)), "targets": [" w3", " w4"]}
        for i in range(300)
    ]
    words.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"model.source={model}", f"dataset.source={words}"]
