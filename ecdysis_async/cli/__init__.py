"""The `ecdysis` command: restart, stop and look at a service from outside.

It needs the extra ``cli``, and says so where that is missing; nothing else of the package may import it.
Read first: commands.py (what may be typed), then run.py (which part of a service a process of `ecdysis run` is).
"""

from __future__ import annotations

import sys
from typing import NoReturn

from ecdysis_async._system.garbage import without_collections

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    try:
        with without_collections():
            from .commands import command
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        print("ecdysis: the command needs click: pip install 'ecdysis_async[cli]'", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt:
        # In the middle of the imports. Later, a command says itself what is interrupted.
        sys.exit(130)
    sys.exit(command(prog_name="ecdysis"))
