"""Model files on a node: fetched once, however many replicas ask at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neg_service.models import source

REPLICAS = 4


def at_once(call: Callable[[], object]) -> None:
    threads = [threading.Thread(target=call) for _ in range(REPLICAS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Fetching:
    """Counts calls, and the most that ran at once."""

    def __init__(self, leave: Callable[..., Any]) -> None:
        self.calls = self.running = self.most = 0
        self._leave = leave

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        self.running += 1
        self.most = max(self.most, self.running)
        time.sleep(0.1)
        self.running -= 1
        return self._leave(*arguments)


def test_a_gguf_file_is_unpacked_once_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(_file: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")

    unpack = Fetching(leave)
    monkeypatch.setattr(source, "_unpack_gguf", unpack)
    monkeypatch.setenv("NEG_SERVICE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    at_once(lambda: source.fetch(str(tmp_path / "tiny.gguf")))
    assert unpack.calls == 1


def test_replicas_of_a_node_do_not_download_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").write_bytes(b"")
    download = Fetching(lambda _source: str(tmp_path / "snapshot"))
    monkeypatch.setattr(source, "snapshot_download", download)
    monkeypatch.setenv("NEG_SERVICE_CACHE", str(tmp_path / "cache"))
    at_once(lambda: source.fetch("someone/something"))
    assert (download.calls, download.most) == (REPLICAS, 1)
