"""``python -m ecdysis_async`` is the command ``ecdysis``."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
