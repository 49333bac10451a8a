"""A small run on a local disk, made by hand, and an S3 server for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from infra.s3.server import Server, server_on
from neg_service import schema
from neg_service.storage.objects import LocalStore
from neg_service.storage.parts import encode_part, part_key
from neg_service.storage.run import RunDirectory, write_or_match
from tests.s3 import acting_as

N_SHARDS = 3
LAYERS, NEURONS = 2, 4
TABLES = {
    "prompts": schema.PROMPTS,
    "activations": schema.activations(NEURONS),
    "neurgrad": schema.neurgrad(NEURONS),
}


def identity(dtype: str = "float32") -> dict[str, object]:
    """What decides the numbers of the small run."""
    return {
        "model": {"identity": "sha256:1", "dtype": dtype},
        "prompts": {"sha256": "2", "count": 2 * N_SHARDS},
        "neurons": {"layers": list(range(LAYERS))},
        "plan": {"shard_size": 2, "shards": N_SHARDS},
    }


def tables_of(shard: int) -> dict[str, pa.Table]:
    """Two prompts of two targets; values tell where they belong: prompt.layer and neuron in the digits."""
    ids = [f"p{2 * shard + i}" for i in range(2)]
    row = {"prompt": "x", "targets": ["a", "b"], "target_tokens": [1, 2], "answer": 0, "prediction": 0}
    prompts = [{"prompt_id": i, **row, "probabilities": [0.5, 0.25]} for i in ids]
    active = [
        {"prompt_id": i, "layer": layer, "basis": "paper", "activation": _values(i, layer)}
        for i in ids
        for layer in range(LAYERS)
    ]
    key = {"is_answer": True, "basis": "paper", "probability": 0.5}
    grads = [
        {"prompt_id": i, "target_index": k, "target": "ab"[k], "layer": layer, **key}
        | {"neurgrad": [-v * (k + 1) for v in _values(i, layer)]}
        for i in ids
        for k in range(2)
        for layer in range(LAYERS)
    ]
    rows = {"prompts": prompts, "activations": active, "neurgrad": grads}
    return {name: pa.Table.from_pylist(rows[name], TABLES[name]) for name in TABLES}


def _values(prompt_id: str, layer: int) -> list[float]:
    return [float(np.float32(int(prompt_id[1:]) + 0.1 * layer + 0.01 * n)) for n in range(NEURONS)]


def begin(place: Path, dtype: str = "float32") -> RunDirectory:
    """run.json and nothing else."""
    about = {"model": {"source": "tiny", "layers": LAYERS, "neurons_a_layer": NEURONS}}
    return write_or_match(LocalStore(place), identity(dtype), TABLES, about, {"model": {"source": "tiny"}})


def put(run: RunDirectory, *shards: int) -> None:
    """Whole shards."""
    for shard in shards:
        for name, table in tables_of(shard).items():
            run.store.put(part_key(name, shard), encode_part(name, table, run.fingerprint, shard))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the file's own, started once."""
    started = server_on(tmp_path_factory.mktemp("s3"))
    started.start()
    yield started
    started.stop()
    assert started.pid is None


@pytest.fixture
def as_writer(server: Server) -> Iterator[None]:
    """This process as the one who may write."""
    with acting_as(server.writer):
        yield
