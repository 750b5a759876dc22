"""Full collections of garbage are put off, and nothing else of the collector is changed."""

from __future__ import annotations

import gc
import threading

import pytest

from ecdysis_async._system import garbage as collector
from ecdysis_async._system.garbage import (
    FROZEN_BY_APPLICATION,
    age_all_objects,
    without_collections,
    without_full_collections,
)


def test_objects_are_aged_and_none_is_thawed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "_application_freezes", threading.Event())
    new = [[] for _ in range(10)]  # type: ignore[var-annotated]
    age_all_objects()
    assert any(each is new for each in gc.get_objects(generation=2))
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        assert frozen >= FROZEN_BY_APPLICATION
        for _ in range(2):
            age_all_objects()
            assert gc.get_freeze_count() == frozen
    finally:
        gc.unfreeze()


def test_nothing_is_collected_while_modules_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "_application_freezes", threading.Event())
    begun = 0

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal begun
        begun += phase == "start"

    assert gc.isenabled()
    gc.callbacks.append(note)
    try:
        with without_collections():
            kept = [[] for _ in range(10 * gc.get_threshold()[0])]  # type: ignore[var-annotated]
            during = begun
    finally:
        gc.callbacks.remove(note)
    assert during == 0
    assert gc.isenabled()
    # They are not looked through with the first young objects that come after them.
    assert any(each is kept for each in gc.get_objects(generation=2))


def test_an_application_without_collections_stays_without_them() -> None:
    gc.disable()
    try:
        with without_collections():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_no_full_collection_begins_meanwhile() -> None:
    full = 0

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal full
        full += phase == "start" and info["generation"] == 2

    thresholds = gc.get_threshold()
    # What lives now counts as a full collection's worth, so that the lists below are more than a quarter of it.
    gc.collect()
    gc.set_threshold(100, 1, 1)
    gc.callbacks.append(note)
    try:
        with without_full_collections():
            kept = [[[]] for _ in range(len(gc.get_objects()))]  # type: ignore[var-annotated]
            begun = full
        # Not later: one may begin as soon as it is allowed again.
        assert begun == 0
        kept += [[[]] for _ in range(1000)]
        assert full > 0
        assert gc.get_threshold() == (100, 1, 1)
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*thresholds)


def test_thresholds_that_were_set_meanwhile_stay() -> None:
    thresholds = gc.get_threshold()
    try:
        with without_full_collections():
            gc.set_threshold(500, 5, 5)
        assert gc.get_threshold() == (500, 5, 5)
    finally:
        gc.set_threshold(*thresholds)
