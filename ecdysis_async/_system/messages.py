"""What the command says on its stderr, which processes that come and go have in common."""

from __future__ import annotations

import sys
from typing import TextIO

__all__ = ["say", "write_lines"]


def say(text: str) -> None:
    """Say something in the command's own name, mostly why it ends."""
    write_lines(f"ecdysis: {text}")


def write_lines(text: str) -> None:
    """Write lines in one piece.

    Not by print: with PYTHONUNBUFFERED, which containers like to set, that writes the end of the line by itself, after
    whatever another process writes there in that moment.
    """
    stderr: TextIO | None = sys.stderr
    # None where Python was started without.
    if stderr is not None:
        stderr.write(f"{text}\n")
        stderr.flush()
