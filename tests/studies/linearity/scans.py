"""What studies of a tiny model scan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from neg_service.config import DatasetConfig, JobConfig, ModelConfig, ScanConfig, StorageConfig


def rows() -> list[dict[str, Any]]:
    """Prompts without answers."""
    return [{"prompt": f"w{i} w{i + 1}", "targets": [" w7", " w8", " w11"], "id": f"p{i}"} for i in range(20, 26)]


def configured(model: Path, folder: Path, prompts: list[dict[str, Any]]) -> ScanConfig:
    """A scan of these prompts, all of which lie in a folder with its results."""
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, prompts)))
    return ScanConfig(
        model=ModelConfig(source=str(model)),
        dataset=DatasetConfig(source=str(file)),
        storage=StorageConfig(uri=str(folder / "runs")),
        job=JobConfig(shard_size=2),
    )
