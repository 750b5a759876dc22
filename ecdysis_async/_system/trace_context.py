"""Which trace a restart belongs to, as it is passed between processes (W3C Trace Context, ``traceparent``).

Nothing here knows who makes traces: without anybody who does, there is nothing to pass on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["KEY", "RESOURCE_KEY", "TraceContexts", "add_resource", "trace_contexts"]

# The variable that a new process finds its parent in, as the tools of OpenTelemetry have it.
KEY = "TRACEPARENT"
# What describes a process (OpenTelemetry, environment variable specification).
RESOURCE_KEY = "OTEL_RESOURCE_ATTRIBUTES"

# How many restarts are remembered: those that go on are among the last ones.
MAX_RESTARTS = 16


class TraceContexts:
    """The contexts of the restarts of this process.

    Attributes:
        find_current: returns the context that the running task is in; None for none.
        is_wanted: whether somebody makes traces here.
    """

    def __init__(self) -> None:
        self.find_current: Callable[[], str | None] = lambda: None
        self.is_wanted = False
        self._contexts: dict[str, str] = {}

    def note(self, restart: str, context: str | None) -> None:
        """Take note of the context of a restart; None: nobody has told of one."""
        if restart and context:
            self._contexts[restart] = context
            while len(self._contexts) > MAX_RESTARTS:
                del self._contexts[next(iter(self._contexts))]

    def forget(self) -> None:
        """Be as before anybody made traces here."""
        self.find_current, self.is_wanted = lambda: None, False
        self._contexts.clear()

    def find(self, restart: str) -> str | None:
        """Return the context of a restart; None where there is none."""
        return self._contexts.get(restart)


def add_resource(environment: Mapping[str, str], **facts: object) -> dict[str, str]:
    """Return the variable that says more of a process that is started than the service's own value of it."""
    given = environment.get(RESOURCE_KEY, "")
    names = {name.replace("__", ".") for name in facts}
    kept = [each for each in given.split(",") if each and each.partition("=")[0].strip() not in names]
    kept += [f"{name.replace('__', '.')}={value}" for name, value in facts.items()]
    return {RESOURCE_KEY: ",".join(kept)}


trace_contexts = TraceContexts()
"""Of this process."""
