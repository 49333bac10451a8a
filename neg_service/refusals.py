"""What servers answer when they let nobody in, and what to do about it; also whether nothing answered at all."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import aiohttp
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.exceptions import HTTPClientError

_RENEW = "the credentials in the environment are of a session that is over or another's: renew them"
_REGION = "the bucket is in another region than the environment says: set AWS_DEFAULT_REGION to its own"
# What S3 calls them; no repetition mends one.
_ADVICE = {
    "ExpiredToken": _RENEW,
    "ExpiredTokenException": _RENEW,
    "TokenRefreshRequired": _RENEW,
    "RequestExpired": _RENEW,
    "InvalidToken": "AWS_SESSION_TOKEN does not belong to the keys in the environment",
    "InvalidAccessKeyId": "AWS_ACCESS_KEY_ID is unknown there",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY, perhaps",
    "RequestTimeTooSkewed": "set this machine's clock",
    "PermanentRedirect": _REGION,
    "301": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "AccessDenied": "the key in the environment may not read it",
    "403": "the key in the environment may not read it",
}
# Of libraries that need not be installed, and of Python's own, by name.
_SILENT = ("ConnectError", "ConnectTimeout", "ConnectionError", "ConnectTimeoutError", "EndpointConnectionError")


def said_by_s3(error: BaseException) -> tuple[str, str]:
    """What S3 calls an error, and its words, in one line without a full stop; nothing where it is none of S3's."""
    reply = getattr(error.__cause__, "response", None)
    said = reply.get("Error", {}) if isinstance(reply, dict) else {}
    return str(said.get("Code", "")), " ".join(str(said.get("Message", "")).split()).rstrip(".")


def is_lost_between_regions(error: BaseException) -> bool:
    """Whether a server sends a client on without saying to where: botocore then asks itself, as deep as Python lets."""
    return isinstance(error, HTTPClientError) and isinstance(error.kwargs.get("error"), RecursionError)


def advice_of(error: BaseException) -> str | None:
    """What S3 says, by its name for it, and what to do; None of all that a repetition may mend, or is none of S3's."""
    if is_lost_between_regions(error):
        return f"the server sends every request on to another: {_REGION}"
    code, words = said_by_s3(error)
    return f"{code}: {words}: {_ADVICE[code]}" if code in _ADVICE else None


def is_silence(error: BaseException) -> bool:
    """Whether a server could not be reached at all; one that is not trusted was."""
    chain = list(_behind(error))
    if any(isinstance(one, ssl.SSLError | aiohttp.ClientSSLError) for one in chain):
        return False
    return any(
        isinstance(one, aiohttp.ClientConnectionError | BotoConnectionError | ConnectionRefusedError | socket.gaierror)
        or type(one).__name__ in _SILENT
        for one in chain
    )


def _behind(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__
