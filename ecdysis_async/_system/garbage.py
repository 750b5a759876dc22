"""What the garbage collector is kept from: while modules are imported, and while many connections move or leave.

A full collection looks through everything there is: 80 ms for 5,000 connections on asyncio, 400 ms for 10,000 that
drain, in which nobody is answered. CPython up to 3.13 begins one when what has lived through the younger collections is
more than a quarter of what lived through the last full one (``gc.set_threshold``).
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

__all__ = ["age_all_objects", "without_collections", "without_full_collections"]

# An application that freezes what it began with freezes more objects than this. CPython 3.12 itself begins with 375.
FROZEN_BY_APPLICATION = 1000

NEVER = 2**30

# Set once it was seen to have done so: counting them takes a walk through all, which may be millions, each time.
_application_freezes = threading.Event()


def age_all_objects() -> None:
    """Put all objects into the oldest generation of the collector, as the documentation says of ``gc.unfreeze``.

    For those that will live for long, however young they are: so they are not counted as what lived through younger
    collections, again and again. Garbage that is in a cycle at this moment waits for the next full collection.
    """
    # An application that has frozen what it began with is left alone: its objects would thaw.
    if not _application_freezes.is_set() and gc.get_freeze_count() >= FROZEN_BY_APPLICATION:
        _application_freezes.set()
    if not _application_freezes.is_set():
        gc.freeze()
        gc.unfreeze()


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Collect no garbage while modules are imported: what they make stays, and is old at once.

    Collections in which nothing is found take a tenth of a start. An application that wants none stays without them.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        age_all_objects()
        gc.enable()


@contextlib.contextmanager
def without_full_collections() -> Iterator[None]:
    """Put off full collections of garbage; younger ones go on."""
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], NEVER)
    try:
        yield
    finally:
        # Unless the application has set others meanwhile.
        if gc.get_threshold() == (*before[:2], NEVER):
            gc.set_threshold(*before)
