"""`jobs.control` as a person runs it, on a cluster: what it prints, stores and resumes; `intervene` reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import neg_service
from jobs.control import ControlConfig, control
from jobs.entry import composed
from tests.e2e.commands import scan_config
from tests.here import scan_here

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def arguments(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("data")
    wishes = [0.05, "top", {"margin": -1.0, "against": " w20"}, None]
    rows = [
        {"prompt": f"w{3 * i + 1} w{i + 40} w{i + 7}", "targets": [" w3", " w4"], "answer": " w4", "wanted": wanted}
        for i, wanted in enumerate(wishes)
    ]
    (place / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    others = [{"prompt": f"w{i} w{i + 2}", "targets": [f" w{i + 1}"], "answer": f" w{i + 1}"} for i in range(60, 66)]
    (place / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    return [
        f"model.source={tiny_directory}", f"dataset.source={place / 'asked.jsonl'}", "control.probability=0.03",
        "control.tolerance=0.001", "control.keep_shift=all", f"control.references={place / 'others.jsonl'}",
        "control.holding=references",
    ]  # fmt: skip


@pytest.mark.faults
@pytest.mark.usefixtures("joined")
def test_wishes_are_met_shown_stored_and_read_again_as_edits(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*arguments, f"storage.uri={tmp_path}", "job.shard_size=2"]
    assert control(composed("control", asked, ControlConfig)) == 0
    shown = capsys.readouterr().out
    (run,) = [neg_service.open_run(str(file.parent)) for file in tmp_path.glob("*/run.json")]
    assert run.tables == ["prompts", "control", "control_side_effects", "control_shift"]
    rows = run.table("control").to_table().sort_by("prompt_id").to_pylist()
    assert [(row["kind"], row["wanted"]) for row in rows] == [
        ("probability", 0.05), ("top", 0.0), ("margin", -1.0), ("probability", 0.03)
    ]  # fmt: skip
    n_reached = sum(row["reached"] for row in rows)
    assert f"reached {n_reached} of 4" in shown
    assert rows[0]["reached"]
    assert rows[0]["probability"] == pytest.approx(0.05, abs=0.001)
    # Three are held, three are measured, for each of four wishes and three methods.
    effects = run.table("control_side_effects").to_table().to_pylist()
    assert len(effects) == 12
    assert {row["n"] for row in effects} == {3}
    assert control(composed("control", asked, ControlConfig)) == 0
    assert "this run was finished already" in capsys.readouterr().out

    edits = f"measure.edits={run.uri}/control_shift"
    data = [own for own in arguments if own.startswith(("model.", "dataset."))]
    again = scan_here(scan_config(*data, "measure=intervene", edits, f"storage.uri={tmp_path / 'again'}"))
    seen = {
        (row["prompt_id"], row["edit"]): row["probability"]
        for row in again.table("intervene").to_table().to_pylist()
        if row["target"] == " w4"
    }
    for row in rows:
        own = seen[row["prompt_id"], f"{row['prompt_id']}  w4 0"]
        np.testing.assert_allclose(own, row["probability"], rtol=1e-4)
