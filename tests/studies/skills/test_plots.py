"""Figures of a study of skill neurons, whatever the number of its tasks."""

from __future__ import annotations

import pyarrow as pa
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from neg_service.studies.skills import plots as module
from neg_service.studies.skills.options import PROBES


@pytest.mark.parametrize("n_tasks", [1, 2, 5])
def test_titles_and_legends_are_whole(n_tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(module, "png", lambda figure: drawn.append(figure) or b"")
    rows = [
        {"split": "test", "task": f"task{task}", "probe": probe, "n_neurons": size, "is_chosen": size == 4,
         "accuracy": 0.5, "low": 0.4, "high": 0.6}
        for task in range(n_tasks) for probe in PROBES for size in (4, 40)
    ]  # fmt: skip
    module.plots({"accuracy": pa.Table.from_pylist(rows)})
    (figure,) = drawn
    FigureCanvasAgg(figure).draw()
    room = figure.bbox
    for part in (figure._suptitle, *figure.legends):
        box = part.get_window_extent()
        assert room.x0 <= box.x0 < box.x1 <= room.x1, part
        assert room.y0 <= box.y0 < box.y1 <= room.y1, part
