"""The place of lineage events: what is refused, and what a URL or a file's name means.

Apart from `lineage.py`, because it is checked where a scan is planned, and events tell of a planned scan.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from neg_service.errors import ConfigurationError, one_line
from neg_service.places import local_path, require_place, split_scheme, without_credentials

KEY = "job.lineage"
# A server without its scheme would be a file of that name, and http:HOST:PORT too.
_HOST_AND_PORT = re.compile(r"(https?:)?[\w.-]+:[0-9]{1,5}(/.*)?", re.IGNORECASE)


def require_place_of_events(place: str | None) -> None:
    """Refuse what is no place for events, before anything is loaded; nothing is written.

    Raises:
        ConfigurationError: it is neither an http(s) URL nor a file, the client is not installed, or it is switched off.
    """
    if place is None:
        return
    path = path_of(place)
    if os.environ.get("OPENLINEAGE_DISABLED", "").strip().lower() == "true":
        raise ConfigurationError(
            "OPENLINEAGE_DISABLED=true in the environment forbids it: leave one of them out",
            setting=KEY,
            value=without_credentials(place),
        )
    try:
        import openlineage.client.transport.http  # noqa: F401  # whether it is there
    except ImportError as error:
        raise ConfigurationError(
            f"needs the extra `lineage`: pip install 'neg-service[lineage]' ({one_line(error)})",
            setting=KEY,
            value=without_credentials(place),
        ) from error
    if path is None:
        address_of(place)
    # Opening a pipe waits for a reader. A terminal and /dev/null take lines as a file does.
    elif path.exists() and not (path.is_dir() or path.is_file() or path.is_char_device()):
        raise ConfigurationError(setting=KEY, value=path, allowed="a file, not a pipe, socket or disk")


def require_lasting_place(place: str | None) -> None:
    """Refuse a file in the working folder, of a job whose folder goes when the job does.

    Raises:
        ConfigurationError: the path is relative.
    """
    if (
        place is not None
        and path_of(place) is not None
        and not Path(str(local_path(place, KEY, ConfigurationError))).is_absolute()
    ):
        raise ConfigurationError(
            "would lie in the job's own directory, which goes when the job does: give an absolute path, or a server",
            setting=KEY,
            value=place,
        )


def path_of(place: str) -> Path | None:
    """The file; None of a URL."""
    require_place(place, KEY, ConfigurationError)
    scheme = split_scheme(place)[0]
    is_mistaken = place.lower() in ("true", "false") or _HOST_AND_PORT.fullmatch(place) is not None
    path = None if scheme in ("http", "https") or is_mistaken else local_path(place, KEY, ConfigurationError)
    if is_mistaken or (path is None and scheme not in ("http", "https")):
        raise ConfigurationError(
            setting=KEY, value=without_credentials(place), allowed="an http(s) URL, http://HOST:PORT, or a file"
        )
    return None if path is None else path.absolute()


def address_of(url: str) -> tuple[str, str]:
    """The server of a URL, and the path."""
    shown = re.split("[?#]", without_credentials(url), maxsplit=1)[0]
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigurationError(f"is no URL of a server: {error}", setting=KEY, value=shown) from error
    if not host or any(one.isspace() for one in url) or parts.query or parts.fragment:
        raise ConfigurationError(
            "give http(s)://HOST:PORT, or the whole address of the endpoint without a query; an API key is set as "
            "OPENLINEAGE_API_KEY in the environment",
            setting=KEY,
            value=shown,
        )
    return f"{parts.scheme}://{parts.netloc}", parts.path.strip("/")
