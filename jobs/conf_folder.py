"""Where the configuration lies: beside this package, or inside it where a wheel was installed."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_IN_WHEEL = _PACKAGE / "conf"

PROJECT = str(_PACKAGE.parent)
CONF = str(_IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent / "conf")
