"""`python -m fp8` is the command `fp8`."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
