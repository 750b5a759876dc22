"""Contexts of restarts are remembered for a while; what describes a process is added to what the user has said."""

from __future__ import annotations

from ecdysis_async._system.trace_context import MAX_RESTARTS, RESOURCE_KEY, TraceContexts, add_resource


def test_a_context_is_found_by_its_restart() -> None:
    contexts = TraceContexts()
    contexts.note("r1", "00-1-2-01")
    contexts.note("r2", None)
    contexts.note("", "00-1-2-01")
    assert [contexts.find(each) for each in ("r1", "r2", "")] == ["00-1-2-01", None, None]
    assert contexts.find_current() is None


def test_not_all_of_them_are_kept() -> None:
    contexts = TraceContexts()
    for number in range(MAX_RESTARTS + 1):
        contexts.note(f"r{number}", "context")
    assert (contexts.find("r0"), contexts.find("r1")) == (None, "context")


def test_what_the_user_says_of_a_process_stays() -> None:
    given = {RESOURCE_KEY: "service.name=shop,ecdysis.slot=7"}
    assert add_resource(given, ecdysis__slot=0) == {RESOURCE_KEY: "service.name=shop,ecdysis.slot=0"}
    assert add_resource({}, ecdysis__slot=0) == {RESOURCE_KEY: "ecdysis.slot=0"}
