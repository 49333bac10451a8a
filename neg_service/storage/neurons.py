"""The neurons of a run that were listed, or ranked over its data set: `neurons.parquet` beside `run.json`.

run.json says how many there are and their digest, so that thousands of neurons are not text there. The file is put
before run.json, and put again by the next start of the run where it is lost or damaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from neg_service.errors import DestinationError, one_line
from neg_service.neurons import NeuronSet
from neg_service.storage.objects import ObjectStore

NEURONS_FILE = "neurons.parquet"


def described(neurons: NeuronSet) -> dict[str, Any]:
    """What run.json says of a run's neurons."""
    source = {"source": neurons.source} if neurons.source else {}
    return {"file": NEURONS_FILE, **source, "count": len(neurons), "sha256": neurons.sha256}


def put_neurons(store: ObjectStore, neurons: NeuronSet) -> None:
    """Write the file."""
    store.put(NEURONS_FILE, neurons.to_parquet())


def neurons_problem(store: ObjectStore, said: Mapping[str, Any]) -> str | None:
    """What is wrong with the file, by what run.json says of it; None if nothing is."""
    found = _read(store, said)
    return found if isinstance(found, str) else None


def read_neurons(store: ObjectStore, said: Mapping[str, Any]) -> NeuronSet:
    """The neurons that run.json speaks of.

    Raises:
        DestinationError: the file is missing or damaged.
    """
    found = _read(store, said)
    if isinstance(found, str):
        raise DestinationError(
            f"{store.uri}/{NEURONS_FILE} is {found}: the command that began the run, with the same neurons, "
            f"puts it there again"
        )
    return found


def require_same_neurons(store: ObjectStore, said: Mapping[str, Any], neurons: NeuronSet) -> None:
    """Refuse to go on with a run that was begun with other neurons; put its file again where it is lost or damaged.

    Raises:
        DestinationError: they are others.
    """
    if said.get("sha256") != neurons.sha256:
        raise DestinationError(
            f"{store.uri}/{NEURONS_FILE} has other neurons: sha256 {said.get('sha256')} of {said.get('count')} there, "
            f"{neurons.sha256} of {len(neurons)} asked; ask for the same, or use another storage.uri or job.name"
        )
    if neurons_problem(store, said) is not None:
        put_neurons(store, neurons)


def _read(store: ObjectStore, said: Mapping[str, Any]) -> NeuronSet | str:
    """The neurons, or what is wrong with the file."""
    content = store.get(NEURONS_FILE)
    if content is None:
        return "missing"
    try:
        found = NeuronSet.from_parquet(content)
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        return f"damaged: {one_line(error)}"
    if found.sha256 != said.get("sha256"):
        return f"damaged: its {len(found)} neurons do not add up to the checksum in run.json"
    return found
