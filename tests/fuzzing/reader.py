"""Turns the bytes of a fuzzer into what an input is made of, so that near inputs come of near bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

__all__ = ["Reader"]

T = TypeVar("T")

# What JSON and TOML have at their edges: numbers that no float holds, no number, nesting.
EDGES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    2**31,
    2**64,
    10**400,
    0.5,
    float("inf"),
    float("-inf"),
    float("nan"),
    "",
    "\0",
    "\ud800",
    "9" * 5000,
    [],
    {},
)


class Reader:
    """Reads the bytes of one input from its beginning; where they have ended, everything is 0 or empty."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing is left."""
        return self._position >= len(self._data)

    def take(self, size: int) -> bytes:
        """Return so many bytes, or what is left."""
        taken = self._data[self._position : self._position + size]
        self._position += size
        return taken

    def number(self, below: int = 256) -> int:
        """Return a number from 0 on, of one byte."""
        taken = self.take(1)
        return taken[0] % below if taken else 0

    def choose(self, among: Sequence[T]) -> T:
        """Return one of these."""
        return among[self.number(len(among))]

    def piece(self) -> bytes:
        """Return some bytes, with their number before them."""
        return self.take(self.number())

    def text(self) -> str:
        """Return some text."""
        return self.piece().decode("utf-8", "replace")

    def pieces(self, data: bytes) -> list[bytes]:
        """Cut bytes into a few pieces."""
        cuts = sorted(self.number() * len(data) // 255 for _ in range(self.number(4)))
        return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]

    def rest(self) -> bytes:
        """Return what is left."""
        return self.take(len(self._data))

    def value(self, words: Sequence[Any], depth: int = 3) -> Any:
        """Make what JSON can hold, with these words among it."""
        match self.number(6 if depth else 4):
            case 0:
                return self.choose(EDGES)
            case 1:
                return self.choose(words)
            case 2:
                return self.text()
            case 3:
                return int.from_bytes(self.take(self.number(10)), signed=True)
            case 4:
                return [self.value(words, depth - 1) for _ in range(self.number(6))]
        return {str(self.choose(words)): self.value(words, depth - 1) for _ in range(self.number(6))}

    def json(self, words: Sequence[Any], **shape: Any) -> bytes:
        """Make an object of JSON: of a known shape, of which some is changed, or any; now and then it is broken.

        Args:
            words: what its texts may be.
            shape: its fields, and a good value of each.
        """
        kind = self.number(8)
        if kind == 0:
            return self.rest()
        if kind == 1:
            return self.choose((b"[", b'{"a":')) * 5000
        body = dict(shape)
        for _ in range(self.number(4)):
            body[str(self.choose((*shape, *words)))] = self.value((*words, *shape))
        text = json.dumps(body if kind > 2 else self.value(words)).encode()
        if kind == 3:
            at = self.number() * len(text) // 256
            return text[:at] + self.piece() + text[at + self.number(4) :]
        return text
