"""Which Iceberg catalogue a run is registered in: what is refused, how it is opened, and what its errors say.

pyiceberg opens it, with what its own configuration says beside what is given. What it and the libraries below it raise
is told in one line, in which neither a key nor the end of an address stands that may hold one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random

from neg_service.errors import ConfigurationError, one_line
from neg_service.places import local_path, require_place, split_scheme
from neg_service.redaction import without_secrets

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog

T = TypeVar("T")

_URI, _WAREHOUSE = "catalogue.uri", "catalogue.warehouse"
_KNOWN = "https://HOST, sqlite:////PATH.db, postgresql://HOST/NAME or thrift://HOST:PORT"
_NO_PLACE = "it has no place for new tables: give catalogue.warehouse, a path or s3://bucket/prefix"
_ATTEMPTS = 5
# For a server to take the connection, and to begin its answer.
_SECONDS = (5, 20)


@dataclass(frozen=True)
class Access:
    """A catalogue by its name in pyiceberg's configuration, by its URI, or the one that is configured."""

    name: str | None
    uri: str | None
    warehouse: str | None
    endpoint_url: str | None

    @classmethod
    def checked(cls, name: str | None, uri: str | None, warehouse: str | None, endpoint_url: str | None) -> Access:
        """What is given, with the full path of a warehouse.

        Raises:
            ConfigurationError: it is no URI, holds a secret, or names a folder that is missing.
        """
        for key, value in {_URI: uri, _WAREHOUSE: warehouse}.items():
            if value is not None:
                require_place(value, key, ConfigurationError)
        if uri is not None:
            _require_uri(uri)
        if warehouse is not None and uri is not None and not split_scheme(warehouse)[0] and not _is_server(uri):
            # Tables keep it as it is, and are read from other folders. A server's warehouse may be a name.
            path = local_path(warehouse, _WAREHOUSE, ConfigurationError)
            warehouse = warehouse if path is None else str(path.absolute())
        return cls(name, uri, warehouse, endpoint_url)

    def open(self) -> Catalog:
        """The catalogue."""
        from pyiceberg.catalog import load_catalog
        from pyiceberg.utils.config import Config

        if self.uri is not None and _is_server(self.uri):
            _require_answer(self.uri)
        elif self.uri is not None and self.warehouse is None and self._is_new_file():
            configured = Config()
            known = configured.get_catalog_config(self.name or configured.get_default_catalog_name()) or {}
            # pyiceberg would make the file first, and leave it.
            if "warehouse" not in known:
                raise ConfigurationError(f"the catalogue cannot be used: {_NO_PLACE}", **self.where())
        given = {"uri": self.uri, "warehouse": self.warehouse, **_properties_of_s3(self.endpoint_url)}
        settled = {key: value for key, value in given.items() if value is not None}
        return make_if_missing(lambda: load_catalog(self.name, **settled))

    def where(self) -> dict[str, Any]:
        """Setting and value, for messages."""
        if self.uri is not None:
            return {"setting": _URI, "value": _shown(self.uri)}
        return {"setting": "catalogue.name"} | ({} if self.name is None else {"value": self.name})

    @contextmanager
    def told(self) -> Iterator[None]:
        """What pyiceberg and the libraries below it raise, as errors of ours.

        Raises:
            ConfigurationError: pyiceberg is not installed, or the catalogue cannot be used.
        """
        try:
            from pyiceberg import exceptions
            from sqlalchemy.exc import SQLAlchemyError
            from strictyaml import YAMLError  # type: ignore[import-untyped]  # what pyiceberg reads its file with
        except ImportError as error:
            raise ConfigurationError(
                f"a catalogue needs the extra `catalogue`: pip install 'neg-service[catalogue]' ({one_line(error)})"
            ) from error
        wrong = (exceptions.NoSuchPropertyException, exceptions.NotInstalledError, exceptions.SignError)
        lost = (exceptions.RESTError, exceptions.CommitFailedException, exceptions.NoSuchNamespaceError)
        try:
            yield
        except YAMLError as error:
            raise ConfigurationError(
                f"pyiceberg's configuration, .pyiceberg.yaml, cannot be read: {without_secrets(_said(error))}"
            ) from error
        # The last one is what its reader of manifests has for one that is damaged.
        except (OSError, ValueError, ImportError, SQLAlchemyError, *wrong, *lost, SystemError) as error:
            raise ConfigurationError(self._explained(error), **self.where()) from error

    def _explained(self, error: BaseException) -> str:
        said = without_secrets(self._without_query(one_line(error))).rstrip(".")
        if "URI missing" in said:
            variable = f"PYICEBERG_CATALOG__{(self.name or 'default').upper()}__URI"
            return (
                f"names no catalogue: give catalogue.uri, one of {_KNOWN}, or configure .pyiceberg.yaml or {variable}"
            )
        if "Could not infer the catalog type" in said:
            return (
                f"its type is not known: give {_KNOWN}; that of another one, with its type, belongs in pyiceberg's "
                "configuration, and its name in catalogue.name"
            )
        if "No default path" in said:
            said = _NO_PLACE
        return f"the catalogue cannot be used: {said}"

    def _without_query(self, said: str) -> str:
        if self.uri is None or self.uri == _shown(self.uri):
            return said
        said = said.replace(self.uri, _shown(self.uri))
        # Drivers of data bases quote single values.
        for value in re.split(r"[?#&;]|=", self.uri[len(_shown(self.uri)) :]):
            said = said.replace(value, "***") if len(value) > 3 else said
        return said

    def _is_new_file(self) -> bool:
        path = _sqlite_path(self.uri or "")
        return path is not None and not path.exists()


def make_if_missing(make: Callable[[], T]) -> T:
    """What that gives, once more where somebody else has made the same between its look and its making.

    pyiceberg makes the data base's own tables and namespaces so.
    """
    again = retry_if_exception(_is_made_already)
    return Retrying(retry=again, stop=stop_after_attempt(_ATTEMPTS), wait=wait_random(0, 0.2), reraise=True)(make)


def _is_made_already(error: BaseException) -> bool:
    from sqlalchemy.exc import DBAPIError, IntegrityError

    return isinstance(error, IntegrityError) or (isinstance(error, DBAPIError) and "already exists" in str(error.orig))


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _shown(uri: str) -> str:
    return re.split("[?#]", uri, maxsplit=1)[0]


def _is_server(uri: str) -> bool:
    return split_scheme(uri)[0] in ("http", "https")


def _sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite catalogue; None of others, and of one in memory."""
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?#]+)", uri)
    return None if match is None or match[1].startswith((":memory:", "file:")) else Path(match[1])


def _require_uri(uri: str) -> None:
    if not split_scheme(uri)[0]:
        raise ConfigurationError(setting=_URI, value=_shown(uri), allowed=f"a URI: {_KNOWN}")
    if _is_server(uri):
        try:
            parts = urlsplit(uri)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigurationError(f"is no URL: {error}", setting=_URI, value=_shown(uri)) from error
        if not host or _shown(uri) != uri:
            raise ConfigurationError(
                "give https://HOST/PATH without a query: a token is set in pyiceberg's configuration, such as "
                "PYICEBERG_CATALOG__DEFAULT__TOKEN",
                setting=_URI,
                value=_shown(uri),
            )
    path = _sqlite_path(uri)
    if path is not None and not path.parent.is_dir():
        raise ConfigurationError(
            f"there is no folder {path.parent}; a full path follows four slashes, as in sqlite:////data/catalogue.db, "
            "and one from the working directory follows three",
            setting=_URI,
            value=_shown(uri),
        )


def _require_answer(url: str) -> None:
    """pyiceberg waits without end for a server that takes connections and never answers, so that it is asked before."""
    import requests

    # Certificates are pyiceberg's own business, which may know an authority that is not known here.
    with suppress(requests.exceptions.SSLError):
        requests.get(f"{url.rstrip('/')}/v1/config", timeout=_SECONDS, stream=True).close()


def _properties_of_s3(endpoint_url: str | None) -> dict[str, str]:
    """The server and the region for pyiceberg, which takes keys from the environment and the AWS chain, as we do."""
    if endpoint_url is None:
        return {}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return {"s3.endpoint": endpoint_url, "s3.region": region}
