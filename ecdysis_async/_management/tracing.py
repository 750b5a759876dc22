"""Restarts as traces of OpenTelemetry: a tree of spans over all processes that take part.

It listens to what is written into the history, and is there only where somebody has asked for it. The spans go to
whatever provider the application has set; where none is set, to the exporters that ``OTEL_TRACES_EXPORTER`` names.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ecdysis_async._system.history import Note, history
from ecdysis_async._system.own_log import logger
from ecdysis_async._system.trace_context import KEY, trace_contexts
from ecdysis_async.errors import StartupError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

__all__ = ["Tracing", "require_opentelemetry"]

# The phase that begins with a state of the predecessor.
_PHASES: Final = {
    "spawning": "start",
    "initialising": "initialise",
    "pausing": "pause",
    "committing": "commit",
    "probation": "probation",
}
_FAILURES: Final = ("failed", "rolled back")

# Where exporters register themselves (OpenTelemetry's SDK for Python).
EXPORTERS = "opentelemetry_traces_exporter"


def require_opentelemetry() -> None:
    """Check that traces can be made.

    Raises:
        StartupError: a package is missing; the text says which.
    """
    if any(importlib.util.find_spec(name) is None for name in ("opentelemetry", "opentelemetry.sdk")):
        raise StartupError("traces need opentelemetry-sdk: pip install 'ecdysis_async[otel]'")


class Tracing:
    """Makes spans of what happens in this process, from :meth:`begin` to :meth:`end`.

    The spans of a start are made once it is over: until then the application may not have set its provider.
    """

    def __init__(self) -> None:
        # The parent of this process, which the application may have taken out of the environment by then.
        self._given = {"traceparent": os.environ.get(KEY, "")}
        self._tracer: Tracer | None = None
        # The span of each restart that this process has begun, and of the phase that it is in.
        self._restarts: dict[tuple[str, str], Span] = {}
        self._phases: dict[tuple[str, str], Span] = {}
        self._drain: Span | None = None
        # What this process has noted of its own start.
        self._start: list[tuple[Note, int, float, dict[str, Any]]] = []

    def begin(self) -> None:
        """Listen from now on. Call it while nothing is served yet: it imports what spans need."""
        _import_all()
        history.observers.append(self._observe)
        trace_contexts.is_wanted = True
        trace_contexts.find_current = _find_current

    def end(self) -> None:
        """Listen no more; harmless if done already."""
        if self._observe in history.observers:
            history.observers.remove(self._observe)
            trace_contexts.forget()

    def _observe(self, kind: Note, at: float, clock: float, facts: dict[str, Any]) -> None:
        try:
            self._make(kind, round(at * 1e9), clock, facts)
        except Exception:  # noqa: BLE001 - whatever it is, it is logged
            # An exporter, or a provider of the application, must not cost a restart.
            logger.exception("a trace cannot be made")

    def _make(self, kind: Note, now: int, clock: float, facts: dict[str, Any]) -> None:
        side = str(facts.get("side", ""))
        match kind:
            case Note.ROLL_OUT:
                self._begin_restart(("anchor", str(facts["restart"])), now, facts)
            case Note.HANDOFF if facts.get("is_restart"):
                self._begin_restart(("predecessor", str(facts["restart"])), now, facts)
                self._begin_phase(("predecessor", str(facts["restart"])), "start", now)
            case Note.STATE if side == "predecessor" and (phase := _PHASES.get(str(facts["state"]))) is not None:
                self._begin_phase((side, str(facts["restart"])), phase, now)
            case Note.STATE if side == "predecessor":
                self._end_phase((side, str(facts["restart"])), now)
            case Note.OUTCOME:
                self._end_restart(side or "predecessor", now, facts)
            case Note.DRAIN if facts.get("restart"):
                parent = _read(trace_contexts.find(str(facts["restart"])))
                self._drain = self._open("ecdysis.drain", now, parent, {"ecdysis.connections": facts["connections"]})
            case Note.DRAINED if self._drain is not None:
                self._drain.end(now)
                self._drain = None
            case Note.PROCESS | Note.STEP | Note.IMPORTS:
                self._start.append((kind, now, clock, facts))
            case Note.STATE if side == "successor" and self._start and facts["state"] in ("probation", "aborted"):
                self._tell_start(now, str(facts["state"]))

    def _begin_restart(self, key: tuple[str, str], now: int, facts: dict[str, Any]) -> None:
        from opentelemetry import trace

        who, restart = key
        parent = _read(trace_contexts.find(restart))
        callers = (trace.get_current_span().get_span_context(), _context_of(_read(facts.get("caller"))))
        links = [trace.Link(caller) for caller in callers if caller is not None and caller.is_valid]
        attributes = {"ecdysis.restart": restart, "ecdysis.generation": facts["generation"], "process.pid": os.getpid()}
        name = "ecdysis.restart" if parent is None else "ecdysis.handoff"
        span = self._find_tracer().start_span(
            name, parent or _nothing(), attributes=attributes, links=links, start_time=now
        )
        self._restarts[key] = span
        # The workers of a roll-out, and not of one that only fills a slot, find it as their parent.
        if who == "anchor" or ("anchor", restart) not in self._restarts:
            trace_contexts.note(restart, _write(span))

    def _begin_phase(self, key: tuple[str, str], name: str, now: int) -> None:
        self._end_phase(key, now)
        if (restart := self._restarts.get(key)) is not None:
            self._phases[key] = self._open(f"ecdysis.{name}", now, _context_in(restart))

    def _end_phase(self, key: tuple[str, str], now: int) -> None:
        if (phase := self._phases.pop(key, None)) is not None:
            phase.end(now)

    def _end_restart(self, side: str, now: int, facts: dict[str, Any]) -> None:
        key = (side, str(facts["restart"]))
        self._end_phase(key, now)
        span = self._restarts.pop(key, None)
        if span is None:
            return
        report = facts["report"]
        span.set_attribute("ecdysis.outcome", str(report["outcome"]))
        if (gap := report.get("accept_gap")) is not None:
            span.set_attribute("ecdysis.accept_gap", gap)
        if report["outcome"] in _FAILURES:
            from opentelemetry.trace import Status, StatusCode

            span.set_status(Status(StatusCode.ERROR, facts.get("why") or str(report["outcome"])))
            if facts.get("phase"):
                span.set_attribute("ecdysis.failed_phase", str(facts["phase"]))
        span.end(now)

    def _tell_start(self, now: int, state: str) -> None:
        """Make the spans of this process' own start, which is over."""
        start, self._start = self._start, []
        begun = next((each for each in start if each[0] is Note.PROCESS), None)
        if begun is None:
            return
        _, at, clock, facts = begun

        def when(seconds: float) -> int:
            # All of it happened by one clock, and is told by another.
            return at + round((seconds - clock) * 1e9)

        attributes = {"ecdysis.generation": facts["generation"], "process.pid": os.getpid(), "ecdysis.state": state}
        if facts.get("restart"):
            attributes["ecdysis.restart"] = facts["restart"]
        span = self._open("ecdysis.successor", when(facts["first"]), _read(self._given["traceparent"]), attributes)
        inside = _context_in(span)
        self._open("ecdysis.imports", when(facts["first"]), inside).end(when(facts["hello"]))
        start_up = self._open("ecdysis.start_up", when(facts["listeners"]), inside)
        for kind, ended, _, step in start:
            if kind is Note.STEP:
                self._open(str(step["what"]), when(step["begun"]), _context_in(start_up)).end(ended)
        start_up.end(next((ended for kind, ended, _, _ in start if kind is Note.IMPORTS), now))
        span.end(now)

    def _open(self, name: str, at: int, parent: Context | None, attributes: dict[str, Any] | None = None) -> Span:
        return self._find_tracer().start_span(name, parent or _nothing(), attributes=attributes, start_time=at)

    def _find_tracer(self) -> Tracer:
        from opentelemetry import trace

        if self._tracer is None:
            if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
                _set_provider()
            self._tracer = trace.get_tracer("ecdysis_async")
        return self._tracer


def _import_all() -> None:
    """Import what the first span would: that takes up to a second, and the loop of a service would stand still."""
    import opentelemetry.sdk.trace.export
    import opentelemetry.trace.propagation.tracecontext  # noqa: F401 - as the line before

    for exporter in _find_exporters().values():
        # What is wrong with it is told where it is used: the application may have a provider of its own.
        with contextlib.suppress(Exception):
            for each in exporter:
                each.load()


def _find_exporters() -> dict[str, list[EntryPoint]]:
    """Return what packages bring for each exporter that the environment names."""
    from importlib.metadata import entry_points

    names = [each.strip() for each in os.environ.get("OTEL_TRACES_EXPORTER", "otlp").split(",")]
    return {name: list(entry_points(group=EXPORTERS, name=name)) for name in names if name not in ("", "none")}


def _set_provider() -> None:
    """Send spans where the environment says, in a process whose application has not said it."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider()
    for name, found in _find_exporters().items():
        if not found:
            logger.warning(
                "traces go nowhere: no package brings the exporter %r (OTEL_TRACES_EXPORTER); for otlp: pip install "
                "opentelemetry-exporter-otlp",
                name,
            )
            continue
        make: Callable[[], Any] = found[0].load()
        provider.add_span_processor(BatchSpanProcessor(make()))
    trace.set_tracer_provider(provider)


def _nothing() -> Context:
    """Return a context without a span: the caller's is linked, and is no parent."""
    from opentelemetry.context import Context

    return Context()


def _read(traceparent: object) -> Context | None:
    """Return the context that a `traceparent` names; None where it names none."""
    if not isinstance(traceparent, str) or not traceparent:
        return None
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({"traceparent": traceparent}, context=Context())
    return context if _context_of(context) is not None else None


def _context_of(context: Context | None) -> Any:
    from opentelemetry import trace

    found = trace.get_current_span(context).get_span_context() if context is not None else None
    return found if found is not None and found.is_valid else None


def _context_in(span: Span) -> Context:
    from opentelemetry import trace

    return trace.set_span_in_context(span, _nothing())


def _write(span: Span) -> str | None:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, context=_context_in(span))
    return carrier.get("traceparent")


def _find_current() -> str | None:
    from opentelemetry import trace

    return _write(trace.get_current_span())
