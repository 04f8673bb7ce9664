"""Puts a table into a page, between `<!-- table:NAME -->` and `<!-- /table -->`; run as a program, the demo's.

python -m fp8.report.readme runs/demo/demo.json README.md
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from ..errors import DataError
from .table import markdown


def with_table(page: str, table: str, name: str = "demo") -> str:
    """The page with the table in its place; `DataError` where the page has no place for it."""
    between = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- /table -->)", re.DOTALL)
    if not between.search(page):
        raise DataError(
            f"the page has no '<!-- table:{name} -->' and '<!-- /table -->' to put the table between; add them."
        )
    return between.sub(lambda found: f"{found[1]}{table}\n{found[2]}", page, count=1)


def main(results: str, page: str) -> None:
    path = Path(page)
    table = markdown(read_results(Path(results)))
    path.write_text(with_table(path.read_text(encoding="utf-8"), table), encoding="utf-8")


def read_results(path: Path) -> dict[str, Any]:
    """The numbers of a demo; `DataError` where there are none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Run `fp8 demo` first.") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}. Run `fp8 demo` again.") from None


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m fp8.report.readme DEMO_JSON PAGE")
    main(*sys.argv[1:])
