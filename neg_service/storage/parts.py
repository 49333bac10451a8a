"""A part: one shard's rows of one table, as one Parquet object that says what it is.

The footer names the run's fingerprint, the shard and the number of rows; every page carries a checksum. So a part
that is damaged, cut short, or lies in another's place can be told from the part alone.
"""

from __future__ import annotations

import io
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq

FOOTER_KEY = b"neg_service"
_KEY = re.compile(r"(?P<table>[a-z_]+)/shard-(?P<shard>\d{6,})\.parquet")


def part_key(table: str, shard: int) -> str:
    """Where a part lies within its run."""
    return f"{table}/shard-{shard:06d}.parquet"


def shard_of(key: str) -> int | None:
    """The shard of a part's key, or None if it is not one."""
    match = _KEY.fullmatch(key)
    return int(match["shard"]) if match else None


def encode_part(table: pa.Table, fingerprint: str, shard: int) -> bytes:
    """A table as the bytes of a part.

    Floats are split into byte streams before zstd: 13 % smaller than plain values where zstd alone gives 4 %, and the
    fastest of the tried ways to read back (measured on NeurGrad of SmolLM2-135M, 2026-11).
    """
    footer = json.dumps({"fingerprint": fingerprint, "shard": shard, "rows": table.num_rows})
    metadata = {**(table.schema.metadata or {}), FOOTER_KEY: footer.encode()}
    floats = [path for field in table.schema if (path := _float_leaf(field))]
    sink = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(metadata),
        sink,
        compression="zstd",
        compression_level=1,
        use_dictionary=[field.name for field in table.schema if pa.types.is_string(field.type)],
        column_encoding=dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
        write_page_checksum=True,
    )
    return sink.getvalue()


def footer_of(schema: pa.Schema) -> dict[str, object]:
    """What a part's footer says of it; empty if it says nothing."""
    found = (schema.metadata or {}).get(FOOTER_KEY)
    return dict(json.loads(found)) if found else {}


def _float_leaf(field: pa.Field) -> str | None:
    """The Parquet path of a field's floats, or None where there are none."""
    if pa.types.is_float32(field.type):
        return str(field.name)
    is_list = pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type)
    return f"{field.name}.list.element" if is_list and pa.types.is_float32(field.type.value_type) else None
