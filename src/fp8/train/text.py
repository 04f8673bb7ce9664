"""The text that ships with the package: Moby-Dick, in the public domain. `demo_text/NOTICE` says where it is from."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ..errors import DataError

MOBY_DICK = "moby-dick"


def moby_dick() -> Path:
    """The path of Moby-Dick, 1.2 MB of UTF-8 text.

    >>> moby_dick().name
    'moby_dick.txt'
    """
    path = Path(str(resources.files("fp8"))) / "demo_text" / "moby_dick.txt"
    if not path.is_file():
        raise DataError(
            f"{path}, which ships with the package, is missing: install fp8 again, or give a text of your own."
        )
    return path


def text_path(name: str) -> Path:
    """The file that a setting names: `moby-dick` is the text that ships with the package, all else is a path."""
    return moby_dick() if name == MOBY_DICK else Path(name).expanduser()
