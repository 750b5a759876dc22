"""How long the imports of a process take, module by module, as ``-X importtime`` would tell: measured from within.

It is switched on where a process follows another one, and off once that process is ready. Only what is executed by
Python's own loaders is measured, and nothing is held in its place.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

__all__ = ["ImportTimes", "Imported", "import_times"]

# What takes less is told of nobody, seconds.
MIN_SECONDS = 0.005

# How many modules are told of at the most: those that took longest.
MAX_MODULES = 40

# Each module has a loader of its own of these types, so that what is put into it concerns no other module.
_LOADERS = (
    importlib.machinery.SourceFileLoader,
    importlib.machinery.SourcelessFileLoader,
    importlib.machinery.ExtensionFileLoader,
)

# Frames of this file name are left out of tracebacks, as CPython does it for its own.
_FROZEN = "<frozen importlib._bootstrap>"


@dataclass(frozen=True, slots=True)
class Imported:
    """A module that was imported.

    Attributes:
        name: in full.
        begun: when, by CLOCK_MONOTONIC.
        seconds: how long that took, with everything that it imports itself.
        depth: how many imports were under way around it.
    """

    name: str
    begun: float
    seconds: float
    depth: int

    def to_json(self) -> list[Any]:
        """Return it as an array of JSON."""
        return [self.name, round(self.begun, 6), round(self.seconds, 6), self.depth]


class ImportTimes:
    """A finder in front of all others, which finds nothing itself and looks at the clock.

    Attributes:
        began: when this process has had its first chance to look, by CLOCK_MONOTONIC.
    """

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._imported: list[Imported] = []
        self._local = threading.local()

    def begin(self) -> None:
        """Measure from now on."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def end(self) -> None:
        """Measure no more; harmless if done already."""
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)

    def take(self) -> list[Imported]:
        """Return what was imported since this was asked for the last time, in the order of the beginnings."""
        imported, self._imported = self._imported, []
        longest = sorted(imported, key=lambda each: -each.seconds)[:MAX_MODULES]
        return sorted(longest, key=lambda each: each.begun)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Let the finders behind this one find a module, and measure its execution."""
        finders = sys.meta_path[sys.meta_path.index(self) + 1 :] if self in sys.meta_path else ()
        for finder in finders:
            find = getattr(finder, "find_spec", None)
            spec: importlib.machinery.ModuleSpec | None = find(name, path, target) if find is not None else None
            if spec is not None:
                # A loader whose method somebody else has replaced, as tools that watch imports do, is left to them.
                if type(spec.loader) in _LOADERS and "exec_module" not in vars(spec.loader):
                    self._measure(name, spec.loader)
                return spec
        return None

    def _measure(self, name: str, loader: Any) -> None:
        def exec_module(module: ModuleType) -> None:
            loader.__dict__.pop("exec_module", None)
            depth = getattr(self._local, "depth", 0)
            self._local.depth = depth + 1
            begun = time.monotonic()
            try:
                loader.exec_module(module)
            finally:
                self._local.depth = depth
                if (seconds := time.monotonic() - begun) >= MIN_SECONDS:
                    self._imported.append(Imported(name, begun, seconds, depth))

        # The application's tracebacks are not to name this line at each of its imports.
        exec_module.__code__ = exec_module.__code__.replace(co_filename=_FROZEN)
        loader.exec_module = exec_module


import_times = ImportTimes()
"""Of this process."""
