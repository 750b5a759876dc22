"""Which release this process runs: where its code and its environment are, without the links that lead there.

The links are followed when the code is loaded. They may lead elsewhere a moment later.
"""

from __future__ import annotations

import os
import sys

__all__ = ["describe_release", "note_application"]


def _directory_of(module: str) -> str | None:
    """Return the directory from which a module was imported, without links; None where it has no file."""
    file: str | None = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return None
    directory = os.path.dirname(os.path.realpath(file))
    for _ in range(module.count(".") + (os.path.splitext(os.path.basename(file))[0] == "__init__")):
        directory = os.path.dirname(directory)
    return directory


_environment = os.path.realpath(sys.prefix) if sys.prefix != sys.base_prefix else None
# A program of one's own is its own release. `ecdysis run` tells later what it has loaded.
_code = _directory_of("__main__")


def note_application(module: str) -> None:
    """Take note of the module that is served, once it is imported."""
    global _code
    _code = _directory_of(module) or _code


def describe_release() -> str:
    """Return the directory of the code, and of the virtual environment where that lies elsewhere."""
    if _code is None or (_environment is not None and _is_inside(_code, _environment)):
        return _environment or "unknown"
    if _environment is None or _is_inside(_environment, _code):
        return _code
    return f"{_code} with {_environment}"


def _is_inside(path: str, directory: str) -> bool:
    return f"{path}{os.sep}".startswith(f"{directory}{os.sep}")
