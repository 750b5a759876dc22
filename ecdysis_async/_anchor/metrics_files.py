"""The files in which prometheus_client keeps the metrics of an application with several processes.

In its multiprocess mode each process has one file for each type of metric, in the directory that
``PROMETHEUS_MULTIPROC_DIR`` names, and whoever is scraped adds the files up. The files are named after the process, and
those of the dead stay, because a counter must not fall. So they pile up, restart by restart.

Here they are named after the slot instead, as prometheus_client lets a server do. The next worker of a slot whose
former one is dead goes on with its files: its counters go on from there, and no file has to be merged, or removed while
somebody reads it. Gauges tell of a process that is alive. Those of a dead one are dropped.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import shutil
import struct
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from ecdysis_async._system.claims import METRICS_ID_KEY
from ecdysis_async._system.shortages import REMEDIES

__all__ = [
    "AUTO",
    "DIRECTORY_KEY",
    "MetricsFile",
    "claim_file",
    "drop_gauges",
    "find_removed",
    "prepare_directory",
    "remove_directory",
]

DIRECTORY_KEY: Final = "PROMETHEUS_MULTIPROC_DIR"

# Stands for a directory of the service's own, which goes with it.
AUTO: Final = "auto"
AUTO_PREFIX = "ecdysis-metrics-"

TYPES: Final = ("counter", "gauge", "histogram", "summary")

# A file begins with the number of bytes of it that are used, these included (prometheus_client/mmap_dict.py).
_EMPTY = struct.pack("i", 8)


@dataclass(frozen=True, slots=True)
class MetricsFile:
    """The files of one worker.

    Attributes:
        directory: the absolute path where they are.
        id: what they are named after.
        found: the counters of all workers that were there when this worker was started.
    """

    directory: str
    id: str
    found: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def variables(self) -> dict[str, str]:
        """What the worker's environment says about them."""
        return {DIRECTORY_KEY: self.directory, METRICS_ID_KEY: self.id}


def prepare_directory(wanted: str, former: str | None, former_wanted: str | None) -> str:
    """Return the absolute path of a directory for the files of a service. It blocks.

    Args:
        wanted: a path, or `AUTO`.
        former: the directory that the service has already: its files stay, also where a relative path leads elsewhere
            from where the new code was started.
        former_wanted: what was wanted then.

    Raises:
        OSError: the directory cannot be made; the text says what to do.
    """
    if former is not None and wanted == former_wanted and os.path.isdir(former):
        return former
    try:
        return _make_empty(wanted)
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "let the service's user write there")
        raise OSError(
            error.errno,
            f"the directory of --metrics-dir {wanted} cannot be made ({error.strerror}): {remedy}, or choose another",
        ) from error


def _make_empty(wanted: str) -> str:
    if wanted == AUTO:
        return tempfile.mkdtemp(prefix=AUTO_PREFIX)
    path = os.path.abspath(wanted)
    os.makedirs(path, mode=0o700, exist_ok=True)
    # What a former service has counted would be counted again, and its gauges would never go.
    for file in _find_files(path, "*"):
        os.unlink(file)
    return path


def remove_directory(path: str) -> None:
    """Remove the directory of a service that has ended, if the service has made it."""
    if os.path.basename(path).startswith(AUTO_PREFIX):
        shutil.rmtree(path, ignore_errors=True)


def claim_file(
    environment: Mapping[str, str], directory: str | None, metrics_dir: str | None, slot: int, taken: Collection[str]
) -> MetricsFile | None:
    """Return the files for a worker that is about to be started; None where the application keeps none.

    Args:
        environment: what the worker is started with.
        directory: where it is started; None for where this process is.
        metrics_dir: the directory that the service manages; None for the one that the environment names.
        slot: the number of the worker's slot.
        taken: what the files of its other workers are named after: a worker that drains still writes to its own.
    """
    path = metrics_dir or environment.get(DIRECTORY_KEY)
    if not path:
        return None
    path = os.path.abspath(os.path.join(directory or ".", path))
    names = (f"slot{slot}-{number}" for number in itertools.count(1))
    return MetricsFile(path, next(name for name in names if name not in taken), frozenset(_find_counters(path)))


def find_removed(file: MetricsFile) -> list[str]:
    """Return the counters that somebody has removed since a worker was started: most likely itself. It blocks."""
    return sorted(file.found - set(_find_counters(file.directory)))


def drop_gauges(file: MetricsFile) -> None:
    """Forget the gauges of a worker that has ended: those of live processes, and those that name their process.

    The largest, the smallest, the most recent one and the sum are meant to outlast it. It blocks.
    """
    for path in _find_files(file.directory, file.id, "gauge"):
        mode = os.path.basename(path).split("_")[1]
        with contextlib.suppress(OSError):
            if mode.startswith("live"):
                os.unlink(path)
            elif mode == "all":
                # The file is emptied: a reader that adds files up does not expect one to go in that moment.
                with open(path, "r+b") as opened:
                    opened.write(_EMPTY)


def _find_counters(directory: str) -> list[str]:
    return _find_files(directory, "*", "counter", "histogram", "summary")


def _find_files(directory: str, id: str, *types: str) -> list[str]:
    directory, id = glob.escape(directory), id if id == "*" else glob.escape(id)
    found = {
        path
        for type in types or TYPES
        for pattern in (f"{type}_{id}.db", f"{type}_*_{id}.db")
        for path in glob.glob(os.path.join(directory, pattern))
    }
    return sorted(found)
