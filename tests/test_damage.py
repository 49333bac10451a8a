"""Files that are damaged: a flipped bit is noticed, and whatever happens to a file is one line or read."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from neg_service.contents import parquet_batches, parquet_of
from neg_service.errors import ConfigurationError, NegServiceError, PromptError
from neg_service.prompts.sources import load_prompts
from tests.readers import TEXTS, list_in, outcome, parquet_file, prompts_in, rows_in
from tests.refusals import refused


@pytest.mark.parametrize("compression", ["none", pytest.param("snappy", marks=pytest.mark.faults), "zstd"])
def test_a_bit_that_flips_in_a_page_is_noticed_wherever_it_is(compression: str) -> None:
    content, rows = parquet_file(write_page_checksum=True, compression=compression)
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    draw = random.Random(0)
    noticed = 0
    for at in range(4, end):
        broken = bytearray(content)
        broken[at] ^= 1 << draw.randrange(8)
        found = outcome(_rows_of, bytes(broken))
        if isinstance(found, NegServiceError):
            assert "damaged" in str(found)
            noticed += 1
        else:
            # In a page's header there are things of no weight.
            assert found == rows
    assert noticed > 0.8 * (end - 4)


def _rows_of(content: bytes) -> list[dict[str, Any]]:
    file = parquet_of("x", content, PromptError)
    batches = parquet_batches("x", file, file.schema_arrow.names, PromptError)
    return [row for batch in batches for row in batch.to_pylist()]


def _with_a_flipped_value(content: bytes, column: str) -> bytes:
    chunk = next(
        chunk
        for i in range(pq.read_metadata(io.BytesIO(content)).num_columns)
        if (chunk := pq.read_metadata(io.BytesIO(content)).row_group(0).column(i)).path_in_schema.startswith(column)
    )
    start = chunk.data_page_offset if chunk.dictionary_page_offset is None else chunk.dictionary_page_offset
    broken = bytearray(content)
    # The end of a chunk is in the values of its last page.
    broken[start + chunk.total_compressed_size - 1] ^= 4
    return bytes(broken)


@pytest.mark.parametrize("column", ["prompt", "targets", "id", "layer", "neuron"])
def test_every_reader_of_parquet_verifies_checksums_and_reads_files_without(tmp_path: Path, column: str) -> None:
    read = list_in if column in ("layer", "neuron") else prompts_in
    for how in ({"write_page_checksum": True}, {"write_page_checksum": True, "data_page_version": "2.0"}, {}):
        content, _ = parquet_file(compression="none", use_dictionary=False, **how)
        (tmp_path / "a.parquet").write_bytes(content)
        whole = read(tmp_path / "a.parquet")
        assert len(whole) == 30
        if how:
            (tmp_path / "a.parquet").write_bytes(_with_a_flipped_value(content, column))
            with refused(ConfigurationError, says=r"a\.parquet: is damaged: .*CRC checksum verification failed"):
                read(tmp_path / "a.parquet")


def test_letters_that_are_none_in_a_file_without_checksums_are_damage(tmp_path: Path) -> None:
    content, _ = parquet_file(compression="none", use_dictionary=False)
    (tmp_path / "a.parquet").write_bytes(content.replace(b"w29", b"w2\xff"))
    with refused(PromptError, "dataset.source", says=r"a\.parquet: is damaged: "):
        load_prompts(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "Parquet file size is 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "but a Git LFS pointer"),
        (b"<html>", "but a page of HTML"),
        (b"prompt,targets\n", "Parquet magic bytes not found"),
    ],
)
def test_what_is_no_parquet_is_named(tmp_path: Path, content: bytes, cause: str) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    for read in (prompts_in, list_in):
        with refused(ConfigurationError, says=rf"a\.parquet: is not Parquet, or damaged: {cause}"):
            read(tmp_path / "a.parquet")


def _broken(content: bytes, draw: random.Random) -> bytes:
    """A file to which one or several of the things happened that happen to files."""
    broken = bytearray(content)
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(broken) + 1)
        how = draw.randrange(6)
        if how == 0:
            del broken[at:]
        elif how == 1:
            del broken[at : at + draw.randrange(1, 9)]
        elif how == 2:
            broken[at:at] = draw.choice([b"\xff", b"\0", b'"', b"[", b"{", b",", b"\n", b"\r", b"-", b"1e999", b"true"])
        elif how == 3:
            broken[at:at] = bytes(broken[draw.randrange(len(broken) + 1) :][:20])
        elif at < len(broken):
            broken[at] ^= 1 << draw.randrange(8)
        if not broken:
            break
    return bytes(broken)


def _all_kinds() -> list[tuple[str, bytes, Callable[[Path], Any]]]:
    plain = [(name, text.encode(), read) for name, text, read in TEXTS if read is not rows_in]
    content, _ = parquet_file()
    return [*plain, ("p.parquet", content, prompts_in), ("n.parquet", content, list_in)]


@pytest.mark.parametrize(("name", "content", "read"), _all_kinds(), ids=[name for name, _, _ in _all_kinds()])
def test_whatever_happens_to_a_file_is_one_line_or_read(
    tmp_path: Path, name: str, content: bytes, read: Callable[[Path], Any]
) -> None:
    draw = random.Random(name)
    refused = 0
    for _ in range(150):
        (tmp_path / name).write_bytes(_broken(content, draw))
        found = outcome(read, tmp_path / name)
        if isinstance(found, NegServiceError):
            refused += 1
            assert "\n" not in str(found)
            assert len(str(found)) < 2000
    assert refused > 30
