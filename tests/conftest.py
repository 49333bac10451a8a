"""Fixtures that several folders share.

They import what they need: the process that hands tests out to others reads this file, too, and would load for seconds
before the first of them is started.
"""

from __future__ import annotations

import copy
import functools
import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import nn

    from neg_service import LanguageModel

# Tests start more than a hundred processes: where bytecode is not kept, each compiles the project anew for a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Ray starts a worker for each CPU ahead, of which replicas here leave most idle: a second of CPU time each.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# It has workers run behind all other programs: beside tests that compute, replicas would get a tenth of a core.
os.environ.setdefault("RAY_worker_niceness", "0")
# A thread that waits for another lets it run: with more threads than cores, waiting busily took minutes for seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# What takes longest, begun first, so that no process is left with it at the end; what waits for Ray and what computes
# by turns, so that two processes seldom do the same.
_SLOW = (
    "tests/faults/", "tests/measures/test_neg.py", "tests/e2e/test_cluster.py", "tests/models/test_mixtures.py",
    "tests/e2e/test_scan.py", "tests/cluster/test_driver.py", "tests/models/test_traps.py", "tests/e2e/test_probe.py",
    "tests/jobs/test_entry.py", "tests/storage/test_s3_results.py", "tests/models/test_hybrids.py",
    "tests/e2e/test_sweep.py", "tests/models/test_weights.py", "tests/storage/test_s3.py",
    "tests/studies/linearity/test_pipeline.py", "tests/jobs/test_console.py", "tests/models/test_quantized.py",
    "tests/cluster/test_metrics.py", "tests/measures/test_batching.py", "tests/e2e/", "tests/jobs/test_starts.py",
    "tests/models/test_configuration.py", "tests/storage/test_requests.py", "tests/models/test_room.py",
    "tests/models/", "tests/report/", "tests/prompts/test_mceval8k.py", "tests/jobs/", "tests/studies/",
    "tests/cluster/", "tests/measures/", "tests/storage/",
)  # fmt: skip


# Nothing that is imported to collect thousands of tests is garbage, and need not be looked at later.
gc.disable()


def pytest_collection_finish() -> None:
    """All tests are there: from here on garbage is looked for, among what is new."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first; the order within a file, and otherwise, stays."""
    items.sort(key=lambda item: next((i for i, part in enumerate(_SLOW) if part in item.nodeid), len(_SLOW)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A process gets whole files, and one of them all files with tests of the default model.

    That takes ten seconds to load and check, and gigabytes with its copy in float64.
    """
    from xdist.scheduler import LoadFileScheduling

    @functools.cache
    def needs_the_model(file: str) -> bool:
        return re.search(r"\bsmollm2: LanguageModel\b", config.rootpath.joinpath(file).read_text("utf-8")) is not None

    class ByFile(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "smollm2" if needs_the_model(file) else file

    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    """The default model, loaded once."""
    import neg_service

    return neg_service.load_model("smollm2")


@pytest.fixture(scope="session")
def smollm2_float64(smollm2: LanguageModel) -> nn.Module:
    """The same weights in float64, for the oracle."""
    return copy.deepcopy(smollm2.model).double()


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    from tests.fakes import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of two CPUs for the tests of a module."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()
