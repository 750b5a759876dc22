"""What is noted of a restart becomes spans; a trace that cannot be made costs nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from ecdysis_async._management.tracing import Tracing, require_opentelemetry
from ecdysis_async._system.history import Note, history
from ecdysis_async._system.trace_context import trace_contexts
from ecdysis_async.errors import StartupError

REPORT = {"outcome": "settled", "accept_gap": 0.01}


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    tracing = Tracing()
    tracing.begin()
    yield exporter
    tracing.end()
    tracing.end()
    assert not history.observers


def note(kind: Note, **facts: Any) -> None:
    history.note(kind, restart="r1", **facts)


def names(spans: tuple[ReadableSpan, ...]) -> list[str]:
    return [span.name for span in spans]


def test_a_handoff_is_a_tree(exporter: InMemorySpanExporter) -> None:
    note(Note.HANDOFF, generation=2, is_restart=True)
    for state in ("initialising", "pausing", "committing", "probation", "settled"):
        note(Note.STATE, side="predecessor", state=state)
    note(Note.OUTCOME, report=REPORT)
    note(Note.DRAIN, connections=3)
    note(Note.DRAINED, report=REPORT)
    spans = exporter.get_finished_spans()
    phases = ["ecdysis.start", "ecdysis.initialise", "ecdysis.pause", "ecdysis.commit", "ecdysis.probation"]
    assert names(spans) == [*phases, "ecdysis.restart", "ecdysis.drain"]
    root = spans[5]
    assert {span.parent.span_id for span in spans if span.parent is not None} == {root.context.span_id}
    assert root.attributes is not None
    assert root.attributes["ecdysis.accept_gap"] == 0.01
    found = trace_contexts.find("r1") or ""
    assert found.startswith(f"00-{root.context.trace_id:032x}-{root.context.span_id:016x}-")


def test_a_start_that_belongs_to_no_restart_is_none(exporter: InMemorySpanExporter) -> None:
    note(Note.HANDOFF, generation=1, is_restart=False)
    note(Note.STATE, side="predecessor", state="initialising")
    note(Note.OUTCOME, report=REPORT)
    assert exporter.get_finished_spans() == ()


def test_what_cannot_be_told_costs_nothing(exporter: InMemorySpanExporter, caplog: pytest.LogCaptureFixture) -> None:
    note(Note.HANDOFF, is_restart=True)
    assert "a trace cannot be made" in caplog.text
    assert exporter.get_finished_spans() == ()


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StartupError, match=r"ecdysis_async\[otel\]"):
        require_opentelemetry()


def test_nothing_is_loaded_unless_it_is_asked_for() -> None:
    program = "import sys, ecdysis_async; ecdysis_async.Ecdysis; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_all_is_imported_before_anything_is_served() -> None:
    # What the first span needs takes up to a second, in the loop of a process that serves.
    program = """
import sys
from ecdysis_async._management.tracing import Tracing
from ecdysis_async._system.history import Note, history

Tracing().begin()
before = set(sys.modules)
history.note(Note.HANDOFF, restart="r1", generation=2, is_restart=True)
history.note(Note.OUTCOME, restart="r1", report={"outcome": "failed"}, why="no database")
print([name for name in set(sys.modules) - before if name.startswith("opentelemetry")])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "OTEL_TRACES_EXPORTER": "console"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[0] == "[]", done
    assert "no database" in done.stdout
