"""``python -m ecdysis_async.cli`` is the command ``ecdysis``."""

from __future__ import annotations

from . import main

if __name__ == "__main__":
    main()
