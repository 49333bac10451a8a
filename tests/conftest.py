"""Fixtures that several folders share."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from torch import nn

import neg_service
from neg_service import LanguageModel
from tests.fakes import save_tiny_model

# Tests start more than a hundred processes: where bytecode is not kept, each compiles the project anew for a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# What takes longest, begun first, so that no process is left with it at the end; what waits for Ray and what computes
# by turns, so that two processes seldom do the same.
_SLOW = (
    "tests/faults/", "tests/models/test_families.py", "tests/e2e/test_cluster.py", "tests/measures/test_neg.py",
    "tests/e2e/test_scan.py", "tests/measures/test_integrated_gradients.py", "tests/e2e/test_sweep.py",
    "tests/measures/test_neurgrad.py", "tests/cluster/test_driver.py", "tests/report/", "tests/e2e/",
    "tests/models/test_placement.py", "tests/cluster/test_metrics.py", "tests/measures/test_noise.py",
    "tests/storage/test_s3_results.py", "tests/models/test_room.py", "tests/storage/test_requests.py",
    "tests/models/test_head.py", "tests/storage/test_s3.py", "tests/prompts/test_mceval8k.py", "tests/jobs/",
    "tests/studies/", "tests/models/", "tests/cluster/", "tests/measures/", "tests/storage/",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first; the order within a file, and otherwise, stays."""
    items.sort(key=lambda item: next((i for i, part in enumerate(_SLOW) if part in item.nodeid), len(_SLOW)))


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    """The default model, loaded once."""
    return neg_service.load_model("smollm2")


@pytest.fixture(scope="session")
def smollm2_float64(smollm2: LanguageModel) -> nn.Module:
    """The same weights in float64, for the oracle."""
    return copy.deepcopy(smollm2.model).double()


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of two CPUs for the tests of a module."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()
