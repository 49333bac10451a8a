"""A catalogue of Iceberg tables in SQLite, what it must have of a run, and the recipe of the README."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import duckdb
import polars
import pyarrow as pa
from pyiceberg.catalog import Catalog, load_catalog

import neg_service
from neg_service.storage.catalogue import Registration, register_run


class Place:
    """A catalogue of its own."""

    def __init__(self, folder: Path, warehouse: str | None = None) -> None:
        self.given = {"uri": f"sqlite:///{folder}/catalogue.db", "warehouse": warehouse or str(folder / "warehouse")}

    def register(self, run: Any, **more: Any) -> Registration:
        return register_run(run, **{**self.given, **more})

    def open(self, **more: str) -> Catalog:
        return load_catalog("default", **self.given, **more)


def counts(done: Registration) -> set[tuple[int, int, int, int]]:
    """Parts of the tables: added, put anew, taken out, and all."""
    return {(one.added, one.replaced, one.removed, one.n_parts) for one in done.tables}


def sorted_rows(table: pa.Table, like: pa.Schema) -> pa.Table:
    """Rows with the types that they have in the parts, in an order of their own."""
    keys = [key for key in ("prompt_id", "target_index", "layer") if key in like.names]
    return table.select(like.names).sort_by([(key, "ascending") for key in keys]).cast(like.remove_metadata())


def require_same_rows(catalogue: Catalog, uri: Any, done: Registration, endpoint_url: str | None = None) -> None:
    """Each reader has of each table the rows that our own reader has."""
    run = neg_service.open_run(uri, endpoint_url)
    for one in done.tables:
        found, expected = catalogue.load_table(one.identifier), run.table(one.name).to_table()
        expected = expected.sort_by(
            [(k, "ascending") for k in ("prompt_id", "target_index", "layer") if k in expected.schema.names]
        )
        expected = expected.replace_schema_metadata(None).combine_chunks()
        assert found.scan().to_arrow().num_rows == one.n_rows == expected.num_rows > 0
        assert sorted_rows(found.scan().to_arrow(), expected.schema).equals(expected)
        frame = polars.scan_iceberg(found, reader_override="pyiceberg").collect().to_arrow()
        assert sorted_rows(frame, expected.schema).equals(expected)
        with duckdb.connect() as connection:
            connection.register("found", found.scan().to_arrow_batch_reader())
            rows = connection.sql("select * from found").to_arrow_table()
        assert sorted_rows(rows, expected.schema).equals(expected)


def run_recipe(uri: str, endpoint_url: str | None, place: Place) -> dict[str, Any]:
    """The names that the README's recipe leaves, of a run with a layer 1 and of its neuron 2."""
    readme = (Path(neg_service.__file__).parent / "storage" / "README.md").read_text()
    (recipe,) = (own for own in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "register_run" in own)
    # Before the places are put in, whose names may have the same digits.
    recipe = recipe.replace("29", "1").replace("865", "3")
    for key, value in {"uri": uri, "endpoint_url": endpoint_url, "catalogue_uri": place.given["uri"]}.items():
        recipe = re.sub(rf"^{key} = .*$", f"{key} = {value!r}", recipe, flags=re.MULTILINE)
    recipe = recipe.replace("s3://runs/warehouse", place.given["warehouse"])
    names: dict[str, Any] = {}
    exec(recipe, names)
    return names
