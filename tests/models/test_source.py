"""Model files on a node: fetched once, however many replicas ask at once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import neg_service
from neg_service.errors import ConfigurationError, ModelError
from neg_service.models import source
from tests.refusals import refused

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


def test_a_path_is_as_good_as_its_text(tiny_directory: Path) -> None:
    assert neg_service.load_model(tiny_directory).identity == source.fetch(str(tiny_directory)).identity
    for bad in (None, 3, ["a"]):
        with refused(ModelError, "source", bad, allowed="a text or a path, such as smollm2"):
            neg_service.load_model(bad)  # type: ignore[arg-type]


# In place, so that only the time of its inode tells; and as another file with the first one's time and size.
@pytest.mark.parametrize("by", ["writing", "renaming"])
@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_weights_that_changed_at_equal_size_and_time_are_others(
    by: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(file: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text(file.read_text())

    monkeypatch.setattr(source, "_unpack_gguf", leave)
    monkeypatch.setenv("NEG_SERVICE_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    file = directory / {"directory": "model.safetensors", "gguf": "model.gguf"}[kind]
    asked = directory if kind == "directory" else file
    file.write_bytes(b"first")
    stat = file.stat()
    first = source.fetch(asked).identity
    assert source.fetch(asked).identity == first
    time.sleep(0.02)
    other = file if by == "writing" else file.with_suffix(".new")
    other.write_bytes(b"other")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(file)
    assert source.fetch(asked).identity != first


def test_a_directory_may_be_called_like_a_file(tiny_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").symlink_to(tiny_directory)
    assert source.fetch(tmp_path / "tiny.gguf").identity == source.fetch(tiny_directory).identity


def test_the_cache_may_be_in_the_home_directory(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NEG_SERVICE_CACHE", "~/models")
    source.fetch(tiny_directory)
    assert (tmp_path / "home" / "models" / "digests").is_dir()
    assert not (tmp_path / "~").exists()
    monkeypatch.setenv("NEG_SERVICE_CACHE", "~nobody-of-this-name/x")
    with refused(ConfigurationError, "NEG_SERVICE_CACHE", "~nobody-of-this-name/x", says="absolute path"):
        source.fetch(tiny_directory)


# A file, below a file, a kernel's file system that takes no files, a name that is too long.
@pytest.mark.parametrize("cache", ["{file}", "{file}/x", "/proc/neg", "/sys/neg", "{file}-" + 300 * "x"])
@pytest.mark.parametrize("model", ["directory", "gguf", "hub"])
def test_a_cache_that_cannot_be_is_told(
    cache: str, model: str, tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file.gguf"
    file.write_bytes(b"GGUF")
    place = cache.format(file=file)
    monkeypatch.setenv("NEG_SERVICE_CACHE", place)
    asked = {"directory": tiny_directory, "gguf": file, "hub": "someone/something"}[model]
    with refused(ConfigurationError, "NEG_SERVICE_CACHE", place, says="set it to a directory"):
        source.fetch(asked)


def test_a_name_that_is_no_utf8_is_refused() -> None:
    with refused(ModelError, "source", says="has bytes that are no UTF-8"):
        neg_service.load_model("e\udce8")
