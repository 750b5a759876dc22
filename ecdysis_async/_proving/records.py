"""What was seen in a proof, and nothing that follows from it: data only. Times are seconds from its beginning."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Any

from .plan import Kind, Step

__all__ = ["Answer", "Connection", "Ending", "Exchange", "Fault", "History", "Memory", "Process", "Restart"]


class Fault(enum.StrEnum):
    """What can be wrong with a service; the words of the verdict."""

    REFUSED = "connection refused"
    RESET = "connection reset"
    UNANSWERED = "closed without an answer"
    TRUNCATED = "answer cut short"
    TIMEOUT = "no answer in time"
    MALFORMED = "answer that is no HTTP"
    STATUS = "wrong status"
    OTHER = "other error"
    REPEATED = "answered twice"
    ORDER = "answered out of order"
    GENERATION = "answered by a generation that was not serving"
    IDLE_CLOSED = "idle connection closed without notice"
    RESTART = "restart with the wrong outcome"
    SLOWER = "slower generation"
    LATE = "answered late"


class Ending(enum.StrEnum):
    """How a connection ended."""

    OURS = "closed by the client"
    ANNOUNCED = "closed by the server as announced"  # Connection: close, or a WebSocket's 1001 or 1012
    IDLE = "closed by the server while idle"
    BUSY = "closed by the server with a request on it"


@dataclass(slots=True)
class Answer:
    """One answer, as it came.

    Attributes:
        at: when it was complete.
        status: of HTTP.
        request: the id of the request that it names; None: it names none.
        pid: the process that it names.
        generation: the generation that it names.
        release: what the application itself names (``identify_by``).
    """

    at: float
    status: int | None = None
    request: int | None = None
    pid: int | None = None
    generation: int | None = None
    release: str | None = None


@dataclass(slots=True)
class Exchange:
    """One request, and what became of it.

    Attributes:
        id: names it, also in the header ``x-ecdysis-request``.
        kind: what its client does.
        what: method and path.
        due: when it was to be sent: latency counts from here, so that no stall hides the requests that it held up.
        connection: the number of its connection; None: there was none.
        delay: how long the client itself took to send it, on purpose.
        late: how much later than due its client woke up: that is the machine's doing, and no server's.
        ended: when it was answered, or had failed.
        fault: why it failed, as its client saw it.
        detail: the same in more words.
        answer: what it was answered with.
    """

    id: int
    kind: Kind
    what: str
    due: float
    connection: int | None = None
    delay: float = 0.0
    late: float | None = None
    ended: float | None = None
    fault: Fault | None = None
    detail: str = ""
    answer: Answer | None = None

    @property
    def latency(self) -> float:
        """How long its answer took."""
        assert self.ended is not None
        return max(0.0, self.ended - self.due - self.delay)


@dataclass(slots=True)
class Connection:
    """One connection, and all that was said on it.

    Attributes:
        number: names it.
        kind: what its client does.
        began: when the client asked for it.
        opened: when it was there.
        requests: the ids that were sent, in their order.
        answers: all answers, in their order, also those that nobody had asked for.
        ended: when it ended.
        ending: how.
    """

    number: int
    kind: Kind
    began: float
    opened: float | None = None
    requests: list[int] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    ended: float | None = None
    ending: Ending | None = None

    @property
    def is_kept(self) -> bool:
        """Whether its client may ask on it again."""
        return self.kind in (Kind.KEPT, Kind.WEBSOCKET)

    @property
    def pid(self) -> int | None:
        """The process that was last known to have it."""
        return self.answers[-1].pid if self.answers else None


@dataclass(slots=True)
class Process:
    """One process of the service.

    Attributes:
        pid: its number.
        generation: None where nobody says.
        seen: when it was first there.
        gone: when it was no longer there.
        states: what it said of itself, each with when it said so first.
    """

    pid: int
    generation: int | None
    seen: float
    gone: float | None = None
    states: list[tuple[float, str]] = field(default_factory=list)


@dataclass(slots=True)
class Restart:
    """One step, as it was carried out.

    Attributes:
        step: what was done.
        asked: when.
        answered: when the command had its outcome.
        ended: when nothing was left of the generation that left.
        code: the command's exit code.
        message: why it failed, in the service's words.
        report: the service's own report.
        killed: the process that was killed.
        killed_at: when.
        former: the processes that served when it was asked.
        generation: the one that serves afterwards.
    """

    step: Step
    asked: float
    answered: float | None = None
    ended: float | None = None
    code: int | None = None
    message: str | None = None
    report: dict[str, Any] | None = None
    killed: int | None = None
    killed_at: float | None = None
    former: frozenset[int] = frozenset()
    generation: int | None = None

    @property
    def end(self) -> float:
        """When it was over."""
        return self.ended or self.answered or self.asked


@dataclass(slots=True)
class Memory:
    """What all processes of the service together used at a moment, in bytes of PSS."""

    at: float
    bytes: int


@dataclass(slots=True)
class History:
    """All that was seen in a proof.

    Attributes:
        exchanges: the requests.
        connections: what they went over.
        restarts: the steps.
        processes: those of the service.
        memory: of the service, from time to time.
        generation: the one that served when it began; None where nobody says.
        patience: for how long an answer may be awaited; one that takes longer is late.
        notes: what a reader of the verdict should know.
        began_at: when it began, in seconds since the epoch.
        ended: when the load was over.
    """

    exchanges: list[Exchange] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)
    restarts: list[Restart] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    generation: int | None = None
    patience: float = math.inf
    notes: list[str] = field(default_factory=list)
    began_at: float = 0.0
    ended: float = 0.0
