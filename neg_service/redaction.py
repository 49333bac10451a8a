"""What must not be printed: keys, tokens and passwords, wherever they stand in a text."""

from __future__ import annotations

import os
import re

SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|CREDENTIAL|ACCESS_KEY|API_KEY", re.IGNORECASE)
# Keys of Amazon and of the hub, wherever they stand.
KEYS = re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|\bhf_[A-Za-z0-9]{30,}")
_USER = re.compile(r"(?<=://)[^\s/@'\"]+@")
_QUERY = re.compile(r"(\bhttps?://[^\s?'\"]+)\?[^\s'\"]+")
_OF_FILES = ("PATH", "FILE", "DIR")
_LEAST_SECRET = 8


def without_secrets(text: str) -> str:
    """`text` without what an address carries, without keys, and without values of the environment that are secret."""
    text = _QUERY.sub(r"\1?***", _USER.sub("***@", text))
    text = KEYS.sub("***", text)
    # A file's name is no secret, and short values would take single letters out of words.
    for name, value in os.environ.items():
        # Libraries quote it also as Python writes it; the newline at the end of a file of secrets is no part of it.
        bare = value.strip()
        if SECRET_NAME.search(name) and len(bare) >= _LEAST_SECRET and not name.endswith(_OF_FILES):
            text = text.replace(value, "***").replace(bare, "***").replace(repr(bare)[1:-1], "***")
    return text
