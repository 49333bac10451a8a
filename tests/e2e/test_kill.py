"""The whole facts data set on the default model, with a replica and then the driver killed, against a quiet run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

import neg_service
from neg_service.prompts import facts
from tests.e2e.commands import Running

# Minutes; `make test` kills replicas and drivers of a tiny model in `tests/faults`.
pytestmark = [pytest.mark.ray, pytest.mark.model, pytest.mark.slow, pytest.mark.faults]
ARGUMENTS = ["job.shard_size=16", "cluster.replicas=1", "job.progress_seconds=0"]


def test_a_scan_whose_replica_and_driver_are_killed_ends_in_the_same_tables(tmp_path: Path) -> None:
    n_prompts = len(facts.load())
    quiet = Running("scan", *ARGUMENTS, f"storage.uri={tmp_path}/quiet")
    assert quiet.finish() == 0, quiet.output

    disturbed = [*ARGUMENTS, f"storage.uri={tmp_path}/disturbed"]
    first = Running("scan", *disturbed)
    pid = int(first.wait_for(r"replica 0 is ready: pid (\d+)")[1])
    first.wait_for(r"\d+/\d+ prompts")
    os.kill(pid, signal.SIGKILL)
    first.wait_for(r"replica 0 is lost")
    new = int(first.wait_for(r"replica 1 is ready: pid (\d+)")[1])
    assert new != pid
    first.wait_for(r"(?s)replica 1 is ready.*/\d+ prompts")
    first.kill()

    (place,) = (tmp_path / "disturbed").iterdir()
    after_kill = neg_service.open_run(str(place))
    survived = {path: path.stat().st_mtime_ns for path in place.glob("neurgrad/*.parquet")}
    assert 0 < len(after_kill.done()) < after_kill.n_shards

    second = Running("scan", *disturbed)
    assert second.finish() == 0, second.output
    assert f"{n_prompts}/{n_prompts} prompts" in second.output
    # What was done before was not done again.
    assert all(path.stat().st_mtime_ns == when for path, when in survived.items())

    one, other = (neg_service.open_run(str(next((tmp_path / name).iterdir()))) for name in ("quiet", "disturbed"))
    assert one.fingerprint == other.fingerprint
    assert other.done() == set(range(other.n_shards))
    for name, value in (("prompts", "probabilities"), ("activations", "activation"), ("neurgrad", "neurgrad")):
        a, b = one.table(name).to_table(), other.table(name).to_table()
        other_columns = [c for c in a.column_names if c not in (value, "probability")]
        assert a.select(other_columns).equals(b.select(other_columns))
        x, y = (np.concatenate([np.asarray(v) for v in t[value].to_pylist()]) for t in (a, b))
        # A shard that was lost runs again in smaller batches, which moves the last digits of float32.
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())
    third = Running("scan", *disturbed)
    assert third.finish() == 0
    assert "nothing was done" in third.output
