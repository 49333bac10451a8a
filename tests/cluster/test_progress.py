"""What a person sees of a run that goes on."""

from __future__ import annotations

import io

from neg_service.cluster.messages import ShardResult
from neg_service.cluster.progress import Progress


def test_progress_without_a_terminal_is_a_plain_line_with_rate_and_time_left() -> None:
    stream = io.StringIO()
    progress = Progress(100, 20, 0.0, stream)
    progress.add(ShardResult(0, 40, bytes={"t": 7}))
    line = stream.getvalue()
    assert line.startswith("60/100 prompts (60 %), ")
    assert line.endswith(" left\n")
    assert "\r" not in line
    assert progress.n_now == 40
    assert progress.bytes == 7


def test_progress_is_silent_between_its_lines_but_not_at_the_end() -> None:
    stream = io.StringIO()
    progress = Progress(3, 0, 1000.0, stream)
    progress.add(ShardResult(0, 1))
    assert stream.getvalue() == ""
    progress.add(ShardResult(1, 2))
    assert stream.getvalue().startswith("3/3 prompts (100 %)")
