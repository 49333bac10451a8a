"""A run on a real S3 server in a catalogue whose own files are there, too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.s3.server import BUCKET, Server, server_on
from jobs.catalogue import CatalogueConfig, catalogue
from jobs.entry import composed
from neg_service.errors import DestinationError
from neg_service.storage.catalogue import register_run
from neg_service.storage.run import write_or_match
from neg_service.storage.stores import open_store
from tests.catalogues import Place, counts, require_same_rows, run_recipe
from tests.refusals import refused
from tests.s3 import acting_as
from tests.storage.conftest import TABLES, identity, put

pytestmark = pytest.mark.infra


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server, with this process as the one who may write."""
    started = server_on(tmp_path / "s3")
    started.start()
    with acting_as(started.writer):
        yield started
    started.stop()


def test_on_s3_the_recipe_gives_the_same_rows(
    tmp_path: Path, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    uri, endpoint_url = f"s3://{BUCKET}/results/smollm2 %23-neurgrad", server.endpoint_url
    run = write_or_match(open_store(uri, endpoint_url), identity(), TABLES, {})
    put(run, 0, 1)
    place = Place(tmp_path, f"s3://{BUCKET}/warehouse")
    told = [f"run='{uri}'", f"storage.endpoint_url={endpoint_url}"]
    told += [f"catalogue.{key}={value}" for key, value in place.given.items()]
    assert catalogue(composed("catalogue", told, CatalogueConfig)) == 0
    put(run, 2)
    names = run_recipe(uri, endpoint_url, place)
    assert counts(names["done"]) == {(1, 0, 0, 3)}
    assert names["frame"].height == names["rows"][0][0] == names["table"].num_rows == 12
    s3 = {"s3.endpoint": endpoint_url, "s3.region": "us-east-1"}
    require_same_rows(place.open(**s3), uri, names["done"], endpoint_url)
    assert server.writer.secret_key not in "".join(capfd.readouterr())
    odd = write_or_match(open_store(f"{uri}#1", endpoint_url), identity(), TABLES, {})
    with refused(DestinationError, "run", says="'#'"):
        register_run(odd.store.uri, endpoint_url, **place.given)
