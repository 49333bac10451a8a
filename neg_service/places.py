"""Places that a person names: taken apart without giving a character a meaning that a path or a key does not give it.

A place is a path of this machine or `SCHEME://...`. Nothing but the scheme, and in s3 the first slash after it, means
anything: `#`, `?`, `;`, `%`, blanks and tabs are part of paths and keys, and nothing is percent-decoded, not even
behind `file://`. Only http and https are URLs, whose path ends at `?` or `#`. Inputs may be chains of fsspec, such as
`zip://a.jsonl::https://host/x.zip`, whose first link is what is read.

Credentials have no place in a place: it is printed, logged, stored and seen in lists of processes. The one exception is
the query of an http(s) URL that is read, which may be a signature; it is used, and never shown or kept.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from neg_service.errors import ConfigurationError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# With one slash or none these are mistyped; other names may well begin so.
_ELSEWHERE = re.compile(r"(s3a?|gs|gcs|az|abfss?|https?|ftp|hdfs)(?=:)", re.IGNORECASE)
_URLS = ("http", "https")
# Links of a chain: archives, and copies that are kept.
_CHAINED = ("zip", "tar", "libarchive", "simplecache", "filecache", "blockcache", "cached", "dir", "reference")
# What follows these schemes is no server, and @ and : in it are ordinary or mean a version.
_WITHOUT_HOST = ("file", "local", "data", "github", "git", "gist", *_CHAINED)
# There even a name alone before @ is a credential; Azure's are a container.
_WITHOUT_USER = ("s3", "s3a", "gs", "gcs", "ftp", *_URLS)
_SIGNATURE = re.compile(
    r"\?(.*[&;])?(x-(amz|goog)-(signature|credential|security-token)|signature|awsaccesskeyid|googleaccessid|sig|"
    r"(access_?|auth_?)?token|api_?key|password|secret(_?(access_?)?key)?)=",
    re.IGNORECASE | re.DOTALL,
)
# There no server is named, and so no port; behind the others a password may look like one.
_WITHOUT_PORT = ("s3", "s3a", "gs", "gcs")
_WITH_PASSWORD = ("ftp", "ftps", "sftp", "ssh", "smb", *_URLS)
# Of these no user's name is one.
_ADDRESS = re.compile(r"localhost|[0-9]{1,3}(\.[0-9]{1,3}){3}")
_VERSION = "?versionId="
# Where those of a setting belong, unless it is S3's.
_CREDENTIALS = {
    "job.lineage": "as OPENLINEAGE_API_KEY in the environment",
    "catalogue.uri": "in pyiceberg's configuration: .pyiceberg.yaml, or PYICEBERG_CATALOG__DEFAULT__URI",
}
# What Hydra and a shell take as it is; without a slash it may be a number or another word of Hydra's.
_PLAIN = re.compile(r"(?=.*/)[A-Za-z0-9_./:@%+-]+")


def split_scheme(place: str) -> tuple[str, str]:
    """The scheme in small letters, and what follows `://`; no scheme is a path."""
    match = _SCHEME.match(place)
    return (match[1].lower(), place[match.end() :]) if match else ("", place)


def local_path(place: str | os.PathLike[str], key: str, error: type[ConfigurationError]) -> Path | None:
    """The path of a place on this machine, with `~` resolved; None for a place elsewhere.

    Raises:
        ConfigurationError: a file:// of another host, or what was meant to be elsewhere; of the class `error`.
    """
    if isinstance(place, os.PathLike):
        return Path(place)
    place = str(place)
    scheme, path = split_scheme(place)
    if scheme not in ("", "file"):
        return None
    if scheme == "file":
        host, slash, below = path.partition("/")
        if host not in ("", "localhost"):
            raise error("names a host; an absolute path begins with file:///", setting=key, value=place)
        path = f"{slash}{below}"
        if not path:
            raise error("names no path; give file:///path", setting=key, value=place)
    elif place[:5].lower() == "file:":
        path = place[5:]
    elif found := _ELSEWHERE.match(place):
        meant = f"{found[0]}://{place[found.end() + 1 :].lstrip('/')}"
        shown = place if meant == without_credentials(meant) and not holds_credentials(meant) else f"{found[0]}:"
        raise error(f"two slashes follow {found[1]}:, as in {found[1].lower()}://...", setting=key, value=shown)
    # POSIX leaves open what two slashes at the beginning mean, so that Path keeps them.
    path = re.sub("^/+", "/", path)
    expanded = _expanded(path)
    if path.startswith("~") and expanded == Path(path) and not expanded.exists():
        raise error(
            f"there is no home {expanded.parts[0]}; a folder of that name is ./{path}", setting=key, value=place
        )
    return expanded


def bucket_and_prefix(place: str, key: str, error: type[ConfigurationError]) -> tuple[str, str]:
    """The bucket and the prefix, which has no slash at its ends, of an s3:// place for results.

    Refused are prefixes that some servers or clients change, so that what is put would not be found again.

    Raises:
        ConfigurationError: no bucket, or such a prefix; of the class `error`.
    """
    bucket, _, prefix = split_scheme(place)[1].partition("/")
    if not bucket:
        raise error("names no bucket; give s3://bucket/prefix", setting=key, value=place)
    prefix = prefix.removesuffix("/")
    parts = prefix.split("/") if prefix else []
    reason = None
    if "" in parts:
        reason = "has two slashes in a row after the bucket"
    elif found := [part for part in parts if part in (".", "..")]:
        reason = f"has a part {found[0]!r}, which S3 does not resolve"
    elif "\\" in prefix:
        reason = "has a backslash, which some servers take for a slash"
    elif _VERSION in prefix:
        reason = f"has {_VERSION!r}, which names a version and no place"
    if reason is not None:
        raise error(f"{reason}; give another prefix", setting=key, value=place)
    return bucket, prefix


def require_place(place: str, key: str, error: type[ConfigurationError]) -> None:
    """Refuse what cannot be shown in one line as it is, or must not be shown.

    Raises:
        ConfigurationError: empty, with control characters, not UTF-8, or with credentials; of the class `error`.
    """
    refuse_credentials(key, place, error)
    if not place.strip():
        raise error("is empty; give a path, or s3://bucket/prefix", setting=key, value=place)
    # A tab is shown as it is.
    # Also of what is not quite an address.
    shown = place.partition("?")[0] if _SIGNATURE.search(place) else without_credentials(place)
    if odd := [one for one in place if one != "\t" and unicodedata.category(one) in ("Cc", "Zl", "Zp", "Cs")]:
        raise error(f"has the character {odd[0]!r}, which cannot be shown in one line", setting=key, value=repr(shown))
    if "://" in place and not place.startswith(("/", ".", "~")) and not _SCHEME.match(place):
        scheme, _, rest = place.partition("://")
        # As if it were one of those that may hold a signature.
        shown = f"{scheme}://{without_credentials(f'https://{rest}').removeprefix('https://')}"
        raise error(f"{scheme!r} is no scheme; use a path, file:// or s3://", setting=key, value=shown)


# --- folders and names


def below(place: str, name: str) -> str:
    """The place `name` in the folder at `place`."""
    if is_chain(place):
        first, _, rest = place.partition("::")
        if "://" not in first and first not in ("zip", "tar", "libarchive"):
            return f"{first}::{below(rest, name)}"
        folder = first if "://" in first else f"{first}://"
        return f"{folder if folder.endswith('://') else folder.rstrip('/') + '/'}{name}::{rest}"
    path, rest = place, ""
    if split_scheme(place)[0] in _URLS:
        path = re.split(r"[?#]", place, maxsplit=1)[0]
        rest = place[len(path) :]
    return f"{path.rstrip('/')}/{name}{rest}"


def name_of(place: str) -> str:
    """The last part of a place for results."""
    return place.rstrip("/").rpartition("/")[2]


def parent_of(place: str) -> str | None:
    """The folder of a place for results; None where there is none, as of a bucket."""
    scheme, path = split_scheme(place.rstrip("/"))
    folder, slash, _ = path.rpartition("/")
    if not slash:
        return None
    return f"{scheme}://{folder}" if scheme else folder or "/"


def is_chain(place: str) -> bool:
    """Whether an input is read through another: out of an archive, or by way of a copy."""
    return "::" in place and re.split("://|::", place, maxsplit=1)[0] in _CHAINED


def file_name_of(place: str) -> str:
    """The name of the file that is read at the place of an input."""
    links = place.split("::") if is_chain(place) else [place]
    # simplecache:: alone says how, not what.
    link = next((link for link in links if split_scheme(link)[1] and link not in _CHAINED), links[-1])
    return without_credentials(link).partition(_VERSION)[0].rstrip("/").rpartition("/")[2]


def absolute(place: str) -> str:
    """An input of this machine by its full path, so that it is the same from every directory; others as they are."""
    if is_chain(place):
        first, _, rest = place.partition("::")
        return f"{first}::{absolute(rest)}"
    return str(_expanded(place).absolute()) if is_here(place) else place


def is_here(place: str) -> bool:
    """Whether there is a file or folder at a path."""
    try:
        return _expanded(place).exists()
    # Too long, or with a part that nobody may look into; opening it says so.
    except (OSError, ValueError):
        return False


def _expanded(path: str) -> Path:
    # Before it is a Path, which forgets that ./~x is no home.
    return Path(os.path.expanduser(path))  # noqa: PTH111


# --- credentials


def without_credentials(place: str) -> str:
    """A place as it may be printed and stored: without user and password, and without the query of an http(s) URL."""
    if is_chain(place):
        return "::".join(map(without_credentials, place.split("::")))
    scheme, rest = split_scheme(place)
    if _has_user(scheme, rest):
        rest = rest.rpartition("@")[2]
    if scheme in _URLS:
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    if scheme and scheme not in _WITHOUT_HOST and _SIGNATURE.search(rest):
        rest = rest.partition("?")[0]
    return f"{place[: len(scheme)]}://{rest}" if scheme else place


def holds_credentials(place: str) -> bool:
    """Whether a place carries a user, a password or a signature; that of an http(s) URL may be read through."""
    for link in place.split("::"):
        scheme, rest = split_scheme(link)
        if _has_user(scheme, rest):
            return True
        if scheme and scheme not in (*_WITHOUT_HOST, *_URLS) and _SIGNATURE.search(rest):
            return True
    return False


def refuse_credentials(key: str, value: str, error: type[ConfigurationError] = ConfigurationError) -> None:
    """Refuse a text with an address in it that carries credentials; the message has nothing of it.

    Raises:
        ConfigurationError: of the class `error`.
    """
    # Addresses may stand anywhere in it, and behind one another.
    addresses = [value, *(re.split(r"[\s'\"]", value[found.start() :])[0] for found in _SCHEME.finditer(value))]
    if found := next((address for address in addresses if holds_credentials(address)), None):
        # What may be something else, for a caller that knows it.
        is_url = any(split_scheme(link)[0] in _URLS for link in found.split("::"))
        also = "; an @ in the path of a URL is written %40" if is_url else "; no bucket has a colon in its name"
        where = _CREDENTIALS.get(key, "in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        raise error(
            f"holds credentials, and what is set is printed, stored and seen in lists of processes: set them {where}"
            f"{also}",
            setting=key,
        )


def require_utf8(key: str, value: str, error: type[ConfigurationError] = ConfigurationError) -> None:
    """Refuse a text with bytes of another encoding, as names of files may have: no run could keep it.

    Raises:
        ConfigurationError: of the class `error`.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise error(
            "has bytes that are no UTF-8, which is what results are kept in: rename it, or make a link of another name",
            setting=key,
            value=ascii(value),
        )


def texts_of(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts of a configuration with their keys."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from texts_of(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_of(inner, key)
    elif isinstance(value, str):
        yield key, value


def _has_user(scheme: str, rest: str) -> bool:
    """Whether user and password stand before the server; a password may have slashes that were not escaped."""
    if not scheme or scheme in _WITHOUT_HOST:
        return False
    # Of a list of addresses the first.
    rest = re.split(r",\s*(?=[A-Za-z][A-Za-z0-9+.-]*://)", rest, maxsplit=1)[0]
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, _ = host.rpartition("@")
    if at:
        return scheme in _WITHOUT_USER or ":" in user
    # Neither an address of many colons nor one of Amazon's own names.
    after = re.fullmatch(r"([^:\[\]]+):(.*)", host)
    if after is None or host.startswith("arn:"):
        return False
    if scheme in _WITHOUT_PORT:
        return True
    if "@" not in rest:
        return False
    if re.fullmatch(r"[0-9]*", after[2]) is None:
        return True
    # Digits before a slash are a port, or how a password begins, of which a path with an @ in a name leaves both open.
    before = rest[len(host) :].rpartition("@")[0]
    is_host = _ADDRESS.fullmatch(after[1]) is not None
    return scheme in _WITH_PASSWORD and not is_host and not before.endswith("/")


# --- for messages


def setting(key: str, value: str) -> str:
    """KEY=VALUE as Hydra reads it as that text, quoted where it needs that."""
    if _PLAIN.fullmatch(value):
        return f"{key}={value}"
    # Backslashes count only in front of a quote, and of what would be the value of another setting.
    quoted = re.sub(r"(\\*)('|\$\{)", lambda found: f"{found[1] * 2}\\{found[2]}", value)
    quoted = re.sub(r"\\+$", lambda found: found[0] * 2, quoted)
    return f"{key}='{quoted}'"


def argument(key: str, value: str) -> str:
    """A setting as it can be typed into a shell."""
    whole = setting(key, value)
    if _PLAIN.fullmatch(value):
        return whole
    return shlex.quote(whole) if re.search(r'[$`"\\!]', whole) else f'"{whole}"'


def literal(value: str) -> str:
    """A text as Python reads it, in double quotes."""
    return json.dumps(value, ensure_ascii=False)
