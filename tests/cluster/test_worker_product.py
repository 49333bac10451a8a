"""What was calibrated with one product is measured with it, by whichever replica."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from neg_service.cluster.messages import Shard, WorkerSpec
from neg_service.cluster.prepare import prepare
from neg_service.cluster.worker import ScanWorker
from neg_service.config import DatasetConfig, ModelConfig, ScanConfig, StorageConfig
from neg_service.measures.base import ShardInput


@pytest.fixture
def spec(tiny_directory: Path, tmp_path: Path) -> WorkerSpec:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w3 w4", "targets": [" w5"]}\n')
    config = ScanConfig(
        model=ModelConfig(str(tiny_directory), device="cpu", cpu_product="onednn"),
        dataset=DatasetConfig(source=str(tmp_path / "prompts.jsonl")),
        storage=StorageConfig(uri=str(tmp_path / "results")),
    )
    prepared = prepare(config)
    return WorkerSpec(prepared.config, prepared.info.identity, 1)


def test_calibration_says_its_product(spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = ScanWorker(spec)
    product = worker.start().cpu_product
    assert product is not None
    assert (product["name"], product["reason"]) == ("onednn", "asked for")
    monkeypatch.setattr(worker._measure, "calibrate", lambda *_: {"sigma": 1})
    assert worker.calibrate() == {"sigma": 1, "cpu_product": "onednn"}
    used = []

    def tables(shard: ShardInput) -> dict[str, object]:
        own = shard.model.cpu_product
        used.append(own and own.name)
        return {}

    monkeypatch.setattr(worker._measure, "tables_of", tables)
    calibrations: list[Mapping[str, object]] = [
        {},
        # A run that was calibrated with PyTorch's own product, perhaps before there was another.
        {"sigma": 1},
        {"sigma": 1, "cpu_product": "onednn"},
        {},
    ]
    for calibration in calibrations:
        worker.compute(Shard(0, ()), 1, calibration)
    assert used == ["onednn", "torch", "onednn", "onednn"]
    worker._model.use_product("torch")
    assert worker.calibrate() == {"sigma": 1}
