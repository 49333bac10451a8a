"""A run that extends another one: what its run.json says of the other, and where that is.

The run that is extended is only ever read. What extends it is a run of its own, with shards that are numbered from the
other's last one on; its identity names the other's fingerprint, number of prompts and number of shards.
"""

from __future__ import annotations

from typing import Any

from neg_service.errors import DestinationError
from neg_service.places import below, name_of, parent_of
from neg_service.storage.objects import ObjectStore
from neg_service.storage.run import RUN_COPY, RUN_FILE, read_run_file
from neg_service.storage.stores import open_store


def identity_of_extension(fingerprint: str, config: dict[str, Any]) -> dict[str, Any]:
    """What the identity of a run says of the one that it extends, by the latter's fingerprint and identity."""
    return {
        "fingerprint": fingerprint,
        "prompts": int(config["prompts"]["count"]),
        "shards": int(config["plan"]["shards"]),
    }


def extended_run(
    store: ObjectStore, parsed: dict[str, Any], endpoint_url: str | None
) -> tuple[ObjectStore, dict[str, Any]] | None:
    """Where the run is that one with this run.json extends, and its own run.json; None if it extends none.

    It is looked for beside the other, since both may have been moved, and then where it was.

    Raises:
        DestinationError: it is in neither place, or its run.json is lost or was changed.
    """
    extends = parsed["identity"].get("extends")
    if extends is None:
        return None
    was = str(parsed.get("request", {}).get("job", {}).get("extend"))
    parent = parent_of(store.uri)
    for uri in dict.fromkeys([*([below(parent, name_of(was))] if parent else []), was]):
        place = open_store(uri, endpoint_url, key="run")
        if any(place.get(key) is not None for key in (RUN_FILE, RUN_COPY)):
            found = read_run_file(place)
            if found["fingerprint"] == extends["fingerprint"]:
                return place, found
    raise DestinationError(
        f"{store.uri} extends the run {was}, which has {extends['prompts']} of its prompts and is not there: put it "
        f"back, or beside {store.uri}"
    )
