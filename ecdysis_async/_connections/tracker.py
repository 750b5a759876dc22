"""All connections of one generation, what is counted of them, and the drain that waits for their end.

A data plane opens one :class:`Connection` for everything it accepts, before anything can fail. It closes the connection
when the peer has seen the last of it. Nothing here accepts, reads or writes, and nothing knows a loop.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from ecdysis_async._sockets.entry import Until
from ecdysis_async._system.garbage import age_all_objects
from ecdysis_async.errors import DrainInterrupt
from ecdysis_async.report import DrainCount

from .connection import LEAVING, Connection, current_connection

if TYPE_CHECKING:
    import asyncio

__all__ = ["Tracker"]

T = TypeVar("T")

log = logging.getLogger("ecdysis_async")

# An idle connection is told to close this long before the deadline, so that its goodbye still gets out: a second, and a
# little for each connection, but no more than a tenth of the drain. Closing it any earlier races with the client's next
# request.
FAREWELL_SHARE = 0.1
FAREWELL_SECONDS = 1.0
FAREWELL_SECONDS_EACH = 0.0003

# How long a cancelled handler may take over its `finally` before its connection is aborted.
CANCEL_GRACE_SECONDS = 1.0

# Finishing tasks are started in batches of this many with a turn of the loop between: 10,000 at once would stall those
# that are still being served, and each costs 50 microseconds.
BATCH = 50
# How many of these tasks are told in one turn of the loop that a moment has come: each close costs up to 200
# microseconds.
CALLED_PER_TURN = 20
# How long a connection has to close that is told so only after the deadline, seconds.
LATE_SECONDS = 0.1

# Connections that ended without telling are looked for in batches as well: to ask 10,000 costs some 13 ms.
ASKED_PER_TURN = 200
ASKED_PER_NEWCOMER = 8
# A drain lists what it waits for in batches: to look at 50,000 costs some 12 ms.
LISTED_PER_TURN = 2000
# So few are not asked by newcomers.
FEW = 256
# How often a drain looks for them, and which share of the CPU it takes for that at the most.
PRUNE_SECONDS = 0.05
PRUNE_SHARE = 0.02

# The drain leaves all connections to the transfer for so long at the most, and for this share of its own time. Then it
# begins to wait for each one as well. To move 10,000 takes half a second; on a machine that is short of processors, far
# longer.
SWEEP_SECONDS = 10.0
SWEEP_SHARE = 0.25

# How many of those that were cut are told by name.
MAX_CUT_TOLD = 10

# How many connections are asked what they serve, where somebody looks on.
MAX_DESCRIBED = 1000
# Which of the shared cells has the requests that were told.
TOLD_CELL = 2

Move = Callable[[Callable[[], None]], Awaitable[None]]


class Cancellable(Protocol):
    """A cancel scope of anyio, or a task of asyncio."""

    def cancel(self) -> object: ...


class _Work(Connection):
    """Work without a connection: within ``async with track()``, or a task whose client has gone."""

    is_accepted = False

    def __init__(self, scope: Cancellable, what: str) -> None:
        super().__init__()
        self._scope = scope
        self._what = what

    def what(self) -> str:
        return self._what

    def cancel(self) -> None:
        self._scope.cancel()


class _Moment:
    """A moment of a drain, which may be brought forward; the connections learn of it a few at a time."""

    def __init__(self, at: float) -> None:
        self.at = at
        self.has_come = anyio.Event()
        # All of these are cancelled at once when it comes.
        self.scopes: set[anyio.CancelScope] = set()
        self._waiting: set[anyio.Event] = set()
        self._asleep = anyio.CancelScope(deadline=at)

    def bring_forward(self, at: float) -> None:
        """Let it come then, if that is earlier."""
        self.at = self._asleep.deadline = min(self.at, at)

    async def run(self) -> None:
        """Wait until it comes, cancel the scopes, and wake the waiting connections."""
        with self._asleep:
            await anyio.sleep_forever()
        self.has_come.set()
        for scope in self.scopes:
            scope.cancel()
        while self._waiting:
            for _ in range(min(CALLED_PER_TURN, len(self._waiting))):
                self._waiting.pop().set()
            await anyio.lowlevel.checkpoint()

    async def wait(self, news: anyio.Event) -> None:
        """Wait until the moment comes to this connection, or its event is set for another reason."""
        if not self.has_come.is_set():
            self._waiting.add(news)
            try:
                await news.wait()
            finally:
                self._waiting.discard(news)


class Tracker:
    """All connections of one generation, from their acceptance to their end, and the drain that ends them.

    Attributes:
        draining: set when this generation leaves.
        count: how the connections and jobs have ended since then.
        cut: what was cut at the deadline, in a few words each.
        moves: whether connections move to a successor at this time: then no client is told to come back on a new one.
        on_safe_point: told of each connection that reaches a safe point, while connections are sent to a successor.
        on_leave: called once, in the very turn in which this generation leaves: until then a server writes nothing
            down of what it serves, and each of these functions finds what is going on.
        jobs: how many pieces of work without a connection there are among the connections.
        counters: each tells how many requests a server has begun to answer, where servers count them.
    """

    def __init__(self) -> None:
        self.draining = anyio.Event()
        self.count = DrainCount()
        self.cut: list[str] = []
        self.moves = False
        self.on_safe_point: Callable[[Connection], None] | None = None
        self.on_leave: list[Callable[[], None]] = []
        self.counters: list[Callable[[], int]] = []
        # How many connections this generation has accepted, and how many of them have ended.
        self.opened = self.closed = self.jobs = 0
        # How many had ended when this generation began to leave; what has become of the others, `count` tells.
        self._ended_before: int | None = None
        # In the order in which they are asked whether they have ended without telling: the asked ones go to the end.
        self._connections: OrderedDict[Connection, None] = OrderedDict()
        # How many are still to be asked since the table had doubled, and at which size newcomers ask some of them.
        self._unasked = 0
        self._asking_size = FEW
        # Stands for every task that waits at a safe point without a connection: a background task, a handler of the
        # user's own.
        self._bystander = Connection()
        # Connections that have ended, and left a task behind at a safe point, which has the context of its request. The
        # task keeps the connection alive for as long as it waits.
        self._left_waiting: weakref.WeakSet[Connection] = weakref.WeakSet()
        # While a drain runs, the connections that it still has to start a finishing task for. The drain starts it,
        # because connections are opened in callbacks of asyncio, where there is no task and anyio can start none.
        self._awaited: deque[Connection] | None = None
        self._finishing: Collection[Until] = ()
        self._unfinished = 0
        # Wakes the drain: there is a connection to wait for, or none any more, or the drain shall hurry.
        self._call = anyio.Event()
        self._hurried = False
        # Until when the drain leaves the connections to the transfer.
        self._sweep_end = -math.inf
        # The two counts in memory shared with the predecessor, in a successor. The predecessor reads off them what was
        # lost if this process dies before it has settled.
        self._cells: memoryview | None = None

    def __len__(self) -> int:
        return len(self._connections)

    @property
    def requests(self) -> int:
        """How many requests this generation has begun to answer; of servers that count none, its connections."""
        return sum(count() for count in self.counters) if self.counters else self.opened

    @property
    def ended(self) -> int:
        """How many connections have ended by themselves while this generation served."""
        return self.closed if self._ended_before is None else self._ended_before

    def share(self, cells: memoryview) -> None:
        """Keep the counts in ``cells`` (native unsigned 64-bit integers, two at least) as well from now on."""
        cells[0], cells[1] = self.opened, self.closed
        self._cells = cells

    def note_told(self, requests: int) -> None:
        """Keep in the third cell how many requests somebody outside was told of: that number may not fall any more."""
        if self._cells is not None and len(self._cells) > TOLD_CELL:
            self._cells[TOLD_CELL] = requests

    def leave(self) -> None:
        """Set ``draining``, and call ``on_leave`` in the same turn; harmless if this generation leaves already."""
        if self.draining.is_set():
            return
        self.draining.set()
        self._ended_before = self.closed
        for find in self.on_leave:
            try:
                find()
            except Exception:
                # A defect of this library, or of a server that has changed: it must not keep a generation from leaving.
                log.exception("what a server is doing cannot be found")

    def follow(self, task: asyncio.Task[Any], what: str) -> None:
        """Let the drain wait for a task that serves no connection any more, and cancel it at the deadline.

        Args:
            task: see above.
            what: it does, in a few words, for the log.
        """
        work = _Work(task, what)
        self.open(work)
        task.add_done_callback(lambda _: self.close(work))

    def connections(self) -> tuple[Connection, ...]:
        """Return the open connections; of very many, some may have ended without telling, because not all are asked."""
        self.prune(ASKED_PER_TURN)
        return tuple(self._connections)

    def open(self, connection: Connection) -> None:
        """Count a connection from now on. Call it before anything can fail after the accept."""
        self._connections[connection] = None
        if connection.is_accepted:
            self.opened += 1
            if self._cells is not None:
                self._cells[0] = self.opened
        else:
            self.jobs += 1
        if len(self._connections) > self._asking_size:
            self._ask_some()
        if self._awaited is not None and connection.until in self._finishing:
            self._awaited.append(connection)
            self._call.set()

    def close(self, connection: Connection) -> None:
        """Stop counting a connection; harmless if it was closed already."""
        try:
            del self._connections[connection]
        except KeyError:
            return
        connection.is_closed = True
        if connection.is_at_safe_point:
            self._left_waiting.add(connection)
        if connection.is_accepted:
            self.closed += 1
            if self._cells is not None:
                self._cells[1] = self.closed
        else:
            self.jobs -= 1
        if connection.news is not None:
            connection.news.set()

    def describe(self, limit: int) -> list[str]:
        """Say in a few words each what is being served, as far as the servers tell, and how much there is besides.

        Args:
            limit: how many are told of.
        """
        busy: list[str] = []
        others = 0
        for connection in itertools.islice(self._connections, MAX_DESCRIBED):
            words = connection.describe_requests(connection) if connection.describe_requests is not None else []
            if words or not connection.is_accepted:
                busy += words or connection.describe()
            else:
                others += 1
        others += max(0, len(self._connections) - MAX_DESCRIBED)
        told = busy[:limit]
        if len(busy) > limit:
            told.append(f"{len(busy) - limit} more")
        if others:
            told.append(f"{others} of which no request is known")
        return told

    def describe_cut(self) -> list[str]:
        """Say what was cut at the deadline: some of it by name, and how much more."""
        told = self.cut[:MAX_CUT_TOLD]
        return [*told, f"{len(self.cut) - MAX_CUT_TOLD} more"] if len(self.cut) > MAX_CUT_TOLD else told

    def note_moved(self, connection: Connection) -> None:
        """Count a connection that a successor has taken over; it is closed when its last trace here has gone."""
        connection.moved = True
        self.count.transferred += 1

    @property
    def is_sweeping(self) -> bool:
        """Whether connections are being asked, one after the other, if they can move."""
        return anyio.current_time() < self._sweep_end

    def note_safe_point(self, connection: Connection) -> None:
        """Say that a connection has reached a safe point: it may be passed on at once, if there is a successor."""
        if self.on_safe_point is not None:
            self.on_safe_point(connection)

    def prune(self, count: int) -> None:
        """Ask the next ``count`` connections, and close those that ended without telling."""
        for _ in range(min(count, len(self._connections))):
            connection = next(iter(self._connections))
            if connection.is_over():
                self.close(connection)
            else:
                self._connections.move_to_end(connection)

    def _ask_some(self) -> None:
        """Ask all each time the table has doubled, amortised: a few for each newcomer."""
        if self._unasked > 0:
            self.prune(ASKED_PER_NEWCOMER)
            self._unasked -= ASKED_PER_NEWCOMER
        else:
            self._unasked = len(self._connections)
        self._asking_size = 0 if self._unasked > 0 else 2 * len(self._connections) + FEW

    async def prune_all(self) -> float:
        """Ask all of them, some in each turn of the loop: to ask 5,000 costs 7 ms. Return the seconds it took."""
        spent = 0.0
        for _ in range(0, len(self._connections), ASKED_PER_TURN):
            begun = time.perf_counter()
            self.prune(ASKED_PER_TURN)
            spent += time.perf_counter() - begun
            await anyio.lowlevel.checkpoint()
        return spent

    def until_draining(self, awaitable: Awaitable[T]) -> Coroutine[Any, Any, T]:
        """Await something at a safe point, where this connection may also end. See ``Ecdysis.until_draining``."""
        # Returns the coroutine itself, and so do the callers of this: each request would pay for every coroutine around
        # it.
        connection = current_connection.get()
        if connection is None or connection.is_closed:
            connection = self._bystander
        return connection.at_safe_point(awaitable)

    @contextlib.asynccontextmanager
    async def track(self) -> AsyncIterator[None]:
        """Let the drain wait for a piece of work. See ``Ecdysis.track``."""
        with anyio.CancelScope() as scope:
            work = _Work(scope, f"tracked work of the task {anyio.get_current_task().name}")
            self.open(work)
            token = current_connection.set(work)
            try:
                yield
            finally:
                current_connection.reset(token)
                self.close(work)
        if scope.cancelled_caught:
            raise DrainInterrupt("the drain's deadline came before this work was done")

    async def transfer(self, state: Any) -> None:
        """Offer the running handler's connection for transfer. See ``Ecdysis.transfer``."""
        # Here, where the handler's traceback shows which code offers what is no JSON.
        json.dumps(state, allow_nan=False)
        connection = current_connection.get() or self._bystander
        await anyio.lowlevel.checkpoint()
        if connection.interrupted:
            raise DrainInterrupt(LEAVING)
        if self.moves and connection.movable:
            await connection.transfer(state, self.note_safe_point)

    async def drain(self, timeout: float, *, kinds: Collection[Until] = tuple(Until), move: Move | None = None) -> None:
        """Wait for every connection, each in a task of its own; interrupt, cancel and abort what is left at the end.

        Connections that are accepted meanwhile are waited for as well. Cancellation leaves all of them as they are.

        Args:
            timeout: seconds until the deadline.
            kinds: which connections to wait for: of listeners that end with the drain, or serve to the exit, or both.
            move: passes connections on to a successor until it is cancelled, and calls back once each was asked. What
                it has moved by then costs the drain no task.
        """
        self.leave()
        # Connections that ended before, without telling, are none that this drain has waited for.
        if len(self._connections) <= ASKED_PER_TURN:
            self.prune(ASKED_PER_TURN)
        else:
            await self.prune_all()
        hurries = self._hurried
        if hurries:
            timeout = min(timeout, FAREWELL_SECONDS)
        self._finishing = kinds
        deadline = _Moment(anyio.current_time() + timeout)
        lead = FAREWELL_SECONDS + FAREWELL_SECONDS_EACH * len(self._connections)
        farewell = _Moment(deadline.at - min(lead, timeout * FAREWELL_SHARE))
        try:
            async with anyio.create_task_group() as housekeepers:
                housekeepers.start_soon(self._prune_regularly)
                housekeepers.start_soon(self._interrupt_bystanders, farewell)
                for moment in (farewell, deadline):
                    housekeepers.start_soon(moment.run)
                if move is not None:
                    self._sweep_end = anyio.current_time() + min(SWEEP_SECONDS, timeout * SWEEP_SHARE)
                    housekeepers.start_soon(self._move, move, farewell)
                async with anyio.create_task_group() as finishers:
                    self._awaited = deque()
                    await self._list_awaited(self._awaited, kinds)
                    # The end of the task group cannot decide when all is done: it refuses new tasks a moment before
                    # the drain would know, and work may begin in that very moment.
                    while self._awaited or self._unfinished:
                        self._call = anyio.Event()
                        if self._hurried and not hurries:
                            hurries = True
                            farewell.bring_forward(anyio.current_time())
                            deadline.bring_forward(anyio.current_time() + FAREWELL_SECONDS)
                        if self._awaited and not hurries and anyio.current_time() < self._sweep_end:
                            with anyio.CancelScope(deadline=self._sweep_end):
                                await self._call.wait()
                            continue
                        self._finish_some(finishers, self._awaited, farewell, deadline)
                        if len(self._awaited) >= BATCH:
                            # Each of these tasks lives for as long as its connection. A single task that comes later
                            # is not aged: then young collections would never see any garbage again.
                            age_all_objects()
                        if self._awaited:
                            await anyio.lowlevel.checkpoint()
                        elif self._unfinished:
                            await self._call.wait()
                    self._awaited = None
                housekeepers.cancel_scope.cancel()
        finally:
            self._awaited = None
        self._interrupt_waiting()

    @property
    def is_hurried(self) -> bool:
        """Whether the deadline was made now."""
        return self._hurried

    def hurry(self) -> None:
        """Make the deadline of this drain, or of the one to come, now: only a last goodbye is waited for.

        It may be called in a callback of the loop, where anyio knows no time, and before there is a loop.
        """
        self._hurried = True
        self._call.set()

    async def _move(self, move: Move, farewell: _Moment) -> None:
        """Pass connections on, until it is time for the goodbyes."""

        def end_sweep() -> None:
            self._sweep_end = -math.inf
            self._call.set()

        with anyio.CancelScope() as scope:
            farewell.scopes.add(scope)
            if farewell.has_come.is_set():
                scope.cancel()
            try:
                await move(end_sweep)
            finally:
                farewell.scopes.discard(scope)
                end_sweep()

    def _note_end(self, connection: Connection) -> None:
        if connection.moved:
            # Counted already. It may have been told to close while it was on its way.
            return
        if not connection.is_accepted:
            self.count.jobs_done += 1
        elif connection.silent:
            self.count.silent += 1
        else:
            self.count.drained += 1

    async def _list_awaited(self, awaited: deque[Connection], kinds: Collection[Until]) -> None:
        """Let this drain wait for all that there is of these kinds; what comes from now on lists itself (``open``)."""
        present = tuple(self._connections)
        for begin in range(0, len(present), LISTED_PER_TURN):
            if begin:
                await anyio.lowlevel.checkpoint()
            awaited.extend(each for each in present[begin : begin + LISTED_PER_TURN] if each.until in kinds)

    def _finish_some(
        self, finishers: TaskGroup, awaited: deque[Connection], farewell: _Moment, deadline: _Moment
    ) -> None:
        """Start the finishing of a batch."""
        batch = CALLED_PER_TURN if farewell.has_come.is_set() else BATCH
        for _ in range(min(batch, len(awaited))):
            connection = awaited.popleft()
            if connection.is_over():
                self.close(connection)
            if connection not in self._connections:
                self._note_end(connection)
            else:
                connection.news = anyio.Event()
                self._unfinished += 1
                finishers.start_soon(self._finish, connection, connection.news, farewell, deadline)

    async def _finish(self, connection: Connection, news: anyio.Event, farewell: _Moment, deadline: _Moment) -> None:
        try:
            await self._wait_for_end(connection, news, farewell, deadline)
        except Exception:
            # What a server or a loop of others has raised: no other connection loses its drain over that.
            log.exception("a connection could not be ended; it ends with this process")
            self.close(connection)
        finally:
            # After a cancelled drain, the next one begins afresh.
            connection.news = None
            self._unfinished -= 1
            if not self._unfinished:
                self._call.set()

    async def _wait_for_end(
        self, connection: Connection, news: anyio.Event, farewell: _Moment, deadline: _Moment
    ) -> None:
        """See one connection to its end: first its own way, then politely, then by force."""
        await farewell.wait(news)
        if connection not in self._connections:
            self._note_end(connection)
            return
        news = connection.news = anyio.Event()
        connection.interrupt()
        if deadline.has_come.is_set():
            with anyio.move_on_after(LATE_SECONDS):
                await news.wait()
        else:
            await deadline.wait(news)
        # It may have ended without telling, since such connections were last looked for.
        if connection not in self._connections or connection.is_over():
            self.close(connection)
            self._note_end(connection)
            return
        if connection.is_accepted:
            self.count.cut += 1
        else:
            self.count.jobs_cut += 1
        self.cut += connection.describe()
        for force in (connection.cancel, connection.abort):
            news = connection.news = anyio.Event()
            force()
            with anyio.move_on_after(CANCEL_GRACE_SECONDS):
                await news.wait()
            if connection not in self._connections:
                return
        # Its handler ignores cancellation, or its protocol never hears of the abort: during a TLS handshake none does.
        self.close(connection)

    async def _interrupt_bystanders(self, farewell: _Moment) -> None:
        await farewell.has_come.wait()
        self._interrupt_waiting()

    def _interrupt_waiting(self) -> None:
        """Wake every task that waits at a safe point, and has no connection, or none any more."""
        for connection in (self._bystander, *self._left_waiting):
            connection.interrupt()

    async def _prune_regularly(self) -> None:
        spent = 0.0
        while True:
            await anyio.sleep(max(PRUNE_SECONDS, spent / PRUNE_SHARE))
            spent = await self.prune_all()
