"""`Ecdysis`: one generation of a service, from its first socket to the last of its connections.

It connects what the other modules do: the sockets, the gate before them, the connections behind it, and the handoff on
both of its sides. It is written on anyio and runs on asyncio, uvloop and trio; what is native to a loop stands in
``_accepting``. Here are the public class, and its block from entering to leaving.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import anyio

from ecdysis_async._accepting import data_plane
from ecdysis_async._accepting.gate import Gate
from ecdysis_async._accepting.readiness import Readiness
from ecdysis_async._connections.connection import current_connection
from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._handoff import preflight
from ecdysis_async._handoff.ancestors import Ancestor
from ecdysis_async._handoff.generation import Generation, GenerationLog
from ecdysis_async._handoff.host import AcceptingHost
from ecdysis_async._handoff.stash import At, InheritedStash, Producer, Stashes, Version
from ecdysis_async._management.control_path import locate, make_lock_file
from ecdysis_async._management.exposition import write
from ecdysis_async._management.systemd import find_systemd
from ecdysis_async._management.tracing import Tracing, require_opentelemetry
from ecdysis_async._sockets.addresses import parse_address
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._sockets.owners import describe_held, describe_taken, find_siblings
from ecdysis_async._sockets.registry import Registry
from ecdysis_async._system.claims import is_check, is_worker, restart_id, take_channel
from ecdysis_async._system.forking import withholding_from_children
from ecdysis_async._system.history import SUFFIX, Note, history
from ecdysis_async._system.lock_file import LockFile
from ecdysis_async._system.own_log import let_speak
from ecdysis_async._system.stacks import hear_questions, stop_hearing
from ecdysis_async.errors import DrainInterrupt, EcdysisError, HandoffAborted
from ecdysis_async.report import RestartReport, State
from ecdysis_async.settings import MAX_DRAINING, Settings, StrPath, WebSocketClose, read_signals, read_websocket_close

from .arriving import Arriving
from .commands import Commands
from .exclusive import Exclusives, check_name
from .health import Health, HealthSettings, describe_metrics
from .leaving import Leaving
from .life import Life, Stop
from .listeners import Listeners
from .restarts import Restarts

__all__ = ["Ecdysis", "current", "explain_taken"]

T = TypeVar("T")

# How long `serve` is silent where it accepts nothing, because readiness was not announced, seconds.
SILENT_SECONDS = 1.0

_current: Ecdysis | None = None


def current() -> Ecdysis:
    """Return the ``Ecdysis`` of this process, for an admin endpoint or a handler.

    Raises:
        LookupError: there is none now.
    """
    if _current is None or _current.pid != os.getpid():
        raise LookupError("no Ecdysis runs in this process: enter `async with Ecdysis() as ecdysis:` first")
    return _current


def explain_taken(ecdysis: Ecdysis, error: BaseException) -> str | None:
    """Say of what is in use or locked who has it, and what can be done; None of other errors. It reads /proc."""
    relatives = [each.pid for each in ecdysis.draining_generations]
    if ecdysis.predecessor_pid is not None:
        relatives.append(ecdysis.predecessor_pid)
    if is_worker():
        relatives += find_siblings()
    if (taken := describe_taken(error, relatives)) is not None:
        return taken
    # A generation that has served had what its start has to lock: words about another lock would mislead.
    return describe_held(error, relatives) if ecdysis.state in (State.STARTING, State.WAITING) else None


def _is_drain_interrupt(error: BaseException | None) -> bool:
    """Say whether an exception is a ``DrainInterrupt``, or a group of nothing else."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_drain_interrupt, error.exceptions))
    return isinstance(error, DrainInterrupt)


def _describe_serving(entries: Sequence[Entry], control_path: str | None) -> str:
    return f"serving on {', '.join(map(str, entries)) or 'nothing'}"


class Ecdysis(Listeners):
    """One generation of a service that restarts without losing a connection.

    Enter it with ``async with``; one per process. All times are in seconds.

    Args:
        ready_timeout: how long a successor may take from its start to ``ready()``.
        drain_timeout: how long connections may take to finish once this generation leaves.
        probation: how long a successor has to serve before a restart is final; until then its death undoes it.
        max_draining: how many old generations may drain at once; beyond it the oldest one's deadline is now, and the
            report of the restart and the log say what that has cost.
        exit_timeout: how long this process may take to end once it has drained, whatever its application has left
            behind: threads, jobs, child processes, a shutdown that hangs. Then it is ended by force, and the log and
            the report say what has kept it. ``math.inf``: it may take for ever.
        restart_signals: signals that restart the service.
        stop_signals: signals that stop it; a second one makes the drain's deadline now.
        pid_file: names the process that serves; written atomically, moved when a restart has settled.
        control_socket: where `ecdysis restart`, `stop` and `status` reach this service: a path whose directory is the
            service's own, or a bare name in the default directory, where they find it by themselves.
        systemd: whether to speak to systemd, and to take the sockets it has passed; None: if it started this process
            with NOTIFY_SOCKET (Type=notify), or with sockets; True: NOTIFY_SOCKET must be there; False: never.
        websocket_close: when WebSockets are closed that cannot move to the successor: ``"spread"``, one after the other
            over the drain; or ``"together"``, all at its beginning, for rooms whose members shall meet again at once.
        traces: whether restarts are told as traces of OpenTelemetry (extra ``otel``): to the provider that the
            application sets, or else to the exporters that ``OTEL_TRACES_EXPORTER`` names.
        takeover: the control socket of a running service, whose sockets this process takes over as if that service
            had started it. A successor of this process, whose sockets come from its predecessor, ignores it.
        command: the successor's command line; the one of this process where it is None.
        environment: the successor's complete environment; that of this process where it is None.
        env_file: a file of KEY=VALUE lines, read afresh at each restart, on top of the environment. A variable whose
            line has gone is gone as well, unless ``environment`` has it.
        health_bind: where ``/live`` and ``/ready`` answer, as ``HOST:PORT``, ``unix:PATH`` or ``fd://NAME``: from
            readiness to the end, by the generation that accepts. Entering the block raises OSError where it cannot be
            bound. In workers of ``ecdysis run`` it does nothing: there it is an option.
        metrics: whether ``/metrics`` answers there too, for Prometheus; see also :meth:`metrics`.
        status_page: whether ``/`` answers there too, by a live page for people.

    Raises:
        ValueError, TypeError: a setting that could not work.
        StartupError: traces are asked for, and OpenTelemetry is not installed.
    """

    def __init__(
        self,
        *,
        ready_timeout: float = 60,
        drain_timeout: float = 30,
        probation: float = 5,
        max_draining: int = MAX_DRAINING,
        exit_timeout: float = 10,
        restart_signals: Collection[int] = Settings().restart_signals,
        stop_signals: Collection[int] = Settings().stop_signals,
        pid_file: StrPath | None = None,
        control_socket: StrPath | None = None,
        systemd: bool | None = None,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        env_file: StrPath | None = None,
        websocket_close: Literal["spread", "together"] = "spread",
        takeover: StrPath | None = None,
        traces: bool = False,
        health_bind: str | None = None,
        metrics: bool = False,
        status_page: bool = False,
    ) -> None:
        if traces:
            require_opentelemetry()
        self._traces = traces
        self._settings = Settings(
            ready_timeout=ready_timeout,
            drain_timeout=drain_timeout,
            probation=probation,
            max_draining=max_draining,
            exit_timeout=exit_timeout,
            restart_signals=read_signals(restart_signals),
            stop_signals=read_signals(stop_signals),
            pid_file=Path(pid_file) if pid_file is not None else None,
            command=command if isinstance(command, str) or command is None else tuple(command),  # type: ignore[arg-type]
            environment=dict(environment) if environment is not None else None,
            env_file=Path(env_file) if env_file is not None else None,
            websocket_close=read_websocket_close(websocket_close),
        )
        self.pid = os.getpid()
        # systemd knows the anchor of a worker, and not the worker.
        self._systemd = find_systemd(False if is_worker() else systemd)
        self._takes_activation = systemd is not False
        self._control_path = locate(control_socket) if control_socket is not None else None
        self._takeover_path = locate(takeover) if takeover is not None else None
        if health_bind is None and (metrics or status_page):
            raise ValueError("metrics and status_page need health_bind: the address where they answer")
        self._health_settings = (
            HealthSettings(parse_address(health_bind), metrics=metrics, status_page=status_page)
            if health_bind is not None and not is_worker()
            else None
        )
        # Says in the log what is served, of the sockets and the path of the control socket; it may be replaced.
        self.describe_serving: Callable[[Sequence[Entry], str | None], str] = _describe_serving
        self._registry = Registry()
        self._gate = Gate()
        self._tracker = Tracker()
        self._stashes = Stashes()
        self._inherited_stash = InheritedStash()
        self._entered: Life | None = None

    # What it is

    @property
    def state(self) -> State:
        """Where this generation stands."""
        return self._entered.state if self._entered is not None else State.STARTING

    @property
    def generation(self) -> int:
        """The number of this generation; the first one is 1."""
        return self._life.generation.number

    @property
    def is_successor(self) -> bool:
        """Whether this process was started by a restart."""
        return self._entered is not None and self._entered.inheritance is not None

    @property
    def predecessor_pid(self) -> int | None:
        """The process that this one follows, whether or not it is still there."""
        if self._entered is None or self._entered.inheritance is None:
            return None
        predecessor = self._entered.inheritance.predecessor
        return predecessor.pid if predecessor is not None else None

    @property
    def draining(self) -> anyio.Event:
        """An event to await, set when this generation leaves; each reply from then on should say goodbye.

        Ask ``draining.is_set()`` before the reply is sent, and put the goodbye into it: after a reply without one, the
        client's next request may be on its way.
        """
        return self._tracker.draining

    @property
    def settled(self) -> anyio.Event:
        """An event to await, set when this generation is final; no failure of its own brings the predecessor back then.

        In the first generation it is set once it serves. Begin there what two generations must not do at a time, or
        what could not be undone. It is never set in a generation that ends before.

        Raises:
            RuntimeError: the block was not entered.
        """
        return self._life.settled

    @property
    def drain_timeout(self) -> float:
        """How long connections may take to finish once this generation leaves, in seconds."""
        return self._settings.drain_timeout

    @property
    def websocket_close(self) -> WebSocketClose:
        """When WebSockets are closed once this generation leaves."""
        return self._settings.websocket_close

    @property
    def connections(self) -> int:
        """How many connections, and pieces of tracked work, this generation has at this moment."""
        return len(self._tracker.connections())

    @property
    def draining_generations(self) -> tuple[Ancestor, ...]:
        """The older generations that are still there, and how many connections they have left."""
        return tuple(self._life.generation.lineage.ancestors)

    @property
    def last_report(self) -> RestartReport | None:
        """The last restart that this generation was asked for, or else the one that it came from."""
        return self._entered.last_report if self._entered is not None else None

    def metrics(self) -> str:
        """Return the metrics of this service as Prometheus reads them, for an endpoint of the application's own.

        The content type is ``text/plain; version=0.0.4``. They go on from the generation before. docs/metrics.md says
        what each of them means.

        Raises:
            RuntimeError: the block was not entered, or this is a worker of ``ecdysis run``, which knows of itself only:
                there ``--metrics`` answers for all workers.
        """
        if is_worker():
            raise RuntimeError(
                "a worker knows only what it has counted itself: run `ecdysis run --metrics --health-bind ADDRESS`"
            )
        return write(describe_metrics(self._life, self._life.counting))

    def _hand_counts_on(self) -> dict[str, Any]:
        return self._life.counting.hand_on({each.pid for each in self._life.generation.lineage.ancestors})

    # The block

    @property
    def _life(self) -> Life:
        if self._entered is None:
            raise RuntimeError("this Ecdysis was not entered: do this inside `async with Ecdysis() as ecdysis:`")
        return self._entered

    @property
    def _plane(self) -> data_plane.DataPlane:
        return self._life.plane

    async def __aenter__(self) -> Self:
        global _current
        if self._entered is not None or self.pid != os.getpid():
            raise RuntimeError("an Ecdysis is entered once, in the process that made it: make a new one")
        if is_check():
            # What it would serve, only its run would tell.
            await preflight.tell(take_channel(), preflight.describe_release(None, os.environ))
            raise SystemExit(0)
        self._tracker.draining = anyio.Event()
        # Several tasks may announce readiness, each for its server: one of them does, and the others wait for it.
        self._announcing = anyio.Lock()
        self._body_task = anyio.get_current_task().id
        self._task_group = anyio.create_task_group()
        plane = data_plane.DataPlane(
            self._registry, self._gate, self._tracker, self._task_group, Readiness(self._settings.ready_timeout)
        )
        generation = Generation(
            1,
            self._settings,
            AcceptingHost(plane),
            GenerationLog(1, restart_id()),
            stashes=self._stashes,
            inherited_stash=self._inherited_stash,
        )
        data_plane.activate(plane)
        self._entered = life = Life(generation, plane, self._task_group, anyio.CancelScope())
        if not is_worker():
            generation.count = self._hand_counts_on
            generation.inherit_counts = life.counting.inherit
        self._arriving = Arriving(life)
        self._leaving = Leaving(life)
        self._restarts = Restarts(life, self._leaving)
        self._resources = ExitStack()
        _current = self
        generation.log.speak()
        try:
            if self._traces:
                tracing = Tracing()
                tracing.begin()
                self._resources.callback(tracing.end)
            self._resources.callback(history.close)
            self._resources.callback(self._registry.close, unlink=False)
            self._resources.enter_context(
                withholding_from_children(lambda: [entry.sock for entry in self._registry.entries])
            )
            self._resources.callback(generation.lineage.close)
            is_child = await self._arriving.inherit(self._takeover_path, self._restarts.on_inheritance, self._resources)
            management = life.management = Commands(life, self._restarts, self._leaving).find_management(
                self._systemd,
                takes_activation=self._takes_activation,
                control_path=self._control_path,
                pid_file=self._settings.pid_file,
            )
            self._resources.callback(management.close)
            life.exclusives = self._make_exclusives()
            generation.is_supervised = management.is_supervised
            self._resources.callback(life.reserve.give_up)
            life.reserve.fill()
            await management.open(has_predecessor=life.inheritance is not None)
            health = None
            if self._health_settings is not None:
                health = Health(self._health_settings, life, life.counting)
                await health.open()
            management.handle_signals()
            self._begin_history()
            if health is not None:
                await health.remember()
            await self._task_group.__aenter__()
        except BaseException:
            self._vacate()
            self._entered = None
            raise
        self._registry.on_release = management.park
        self._task_group.start_soon(self._leaving.run)
        self._task_group.start_soon(self._warn_if_never_ready)
        self._task_group.start_soon(self._arriving.tell_of_unread_stashes)
        if life.inheritance is not None:
            self._task_group.start_soon(self._restarts.follow, life.inheritance)
        management.start(self._task_group)
        if health is not None:
            for server in health.servers():
                self._task_group.start_soon(server.run)
        if not is_child:
            # That includes a newcomer: where there is a systemd, it is the main process of a unit of its own.
            management.begin(self._settings.ready_timeout)
        life.body.__enter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        life = self._life
        cancelled: BaseException | None = None
        # A text that says it already is one of this library's.
        if error is not None and not isinstance(error, EcdysisError) and (taken := explain_taken(self, error)):
            error.add_note(taken)
        try:
            is_cut_short = life.body.__exit__(kind, error, trace)
            if life.is_leaving and _is_drain_interrupt(error):
                # What waited in the body was told that this generation leaves, and so it does.
                is_cut_short = True
            if is_cut_short:
                kind = error = trace = None
            try:
                if self._task_group.cancel_scope.cancel_called:
                    # One of the tasks of this block has failed, and its exception says why.
                    self._leaving.hurry()
                    self._leaving.begin()
                else:
                    cancelled = await self._leaving.finish(error)
            finally:
                self._task_group.cancel_scope.cancel()
                try:
                    await self._task_group.__aexit__(kind, error, trace)
                except BaseExceptionGroup as group:
                    # The body's own exception goes its own way, as itself; the others are this block's.
                    others = [each for each in group.exceptions if each is not error]
                    if error is None or others:
                        raise others[0] if len(others) == 1 else group from error
        finally:
            life.state = State.ENDED
            self._leaving.tell_what_is_abandoned()
            self._leaving.note_left()
            self._vacate()
        if error is not None:
            return False
        if cancelled is not None:
            raise cancelled
        if life.is_aborted:
            assert life.inheritance is not None
            summary = life.inheritance.summary
            raise HandoffAborted(f"ecdysis: this generation leaves without having served: {summary}")
        return is_cut_short

    def _begin_history(self) -> None:
        """Write down from now on what happens, where somebody can ask for it: by the path of the control socket."""
        if history.path is None and self._control_path is not None and not is_worker():
            history.open(self._control_path + SUFFIX)
        if history.path is not None:
            hear_questions()
            self._resources.callback(stop_hearing)
            role = "worker" if is_worker() else "service"
            history.note(Note.BEGUN, role=role, generation=self._life.generation.number)

    def _make_exclusives(self) -> Exclusives:
        life, generation = self._life, self._life.generation
        if os.name == "posix":
            # A worker does without where its anchor passes none: a file of its own would exclude no other worker.
            lock_file = LockFile.inherit() or LockFile.open_of(generation.lock_file_place)
            if lock_file is None and not is_worker():
                lock_file = make_lock_file(self._control_path)
            if lock_file is not None:
                generation.lock_file = lock_file
                self._resources.callback(self._close_lock_file, lock_file)
        exclusives = Exclusives(
            generation,
            draining=self._tracker.draining,
            drained=life.drained,
            is_starting=lambda: not life.has_begun,
            is_paused=lambda: life.state is State.PAUSED,
            body_task=self._body_task,
            on_change=life.management.changed,
        )
        self._tracker.on_leave.append(exclusives.leave)
        return exclusives

    def _close_lock_file(self, lock_file: LockFile) -> None:
        life = self._life
        is_ours = life.has_begun or lock_file.is_new
        if is_ours and not (is_worker() or life.has_successor or life.is_aborted):
            lock_file.remove(self._control_path)
        lock_file.close()

    def _vacate(self) -> None:
        global _current
        _current = None
        let_speak(None)
        data_plane.deactivate()
        self._inherited_stash.clear()
        self._resources.close()

    # Serving

    async def ready(self) -> None:
        """Announce that this generation is ready; return when it accepts.

        In the first generation that is at once, in a successor after the predecessor's commit. Calling it again
        does nothing. It does not wait for servers that are being started: their ``serve`` announces readiness itself.

        Raises:
            OSError: a socket cannot listen, or the pid file cannot be written.
            RuntimeError: the block was not entered.
        """
        self._plane.readiness.note_announced()
        async with self._announcing:
            if self._life.state in (State.STARTING, State.WAITING):
                await self._arriving.serve(self._describe)
                if self._life.exclusives is not None:
                    self._life.exclusives.note_serving()

    def _describe(self) -> str:
        return self.describe_serving(self._registry.entries, self._life.management.control_path)

    def _announcement(self) -> Callable[[], Coroutine[Any, Any, None]] | None:
        if self._life.state is not State.STARTING:
            return None
        is_body = anyio.get_current_task().id == self._body_task
        return self._announce_with_others if is_body else self._warn_if_silent

    async def _announce_with_others(self) -> None:
        await self._plane.readiness.wait()
        await self.ready()

    async def _warn_if_silent(self) -> None:
        await anyio.sleep(SILENT_SECONDS)
        if self.state is State.STARTING and not self._plane.readiness.is_awaited:
            self._life.generation.log.warning(
                "serve() was called %g s ago, and nothing is accepted before readiness is announced: await ready() or "
                "serve_forever(), or await serve() in the task that has entered the block",
                SILENT_SECONDS,
            )

    async def _warn_if_never_ready(self) -> None:
        """Say so where the first generation is not ready when a successor would have failed."""
        await anyio.sleep(self._settings.ready_timeout)
        readiness = self._plane.readiness
        if self.state is State.STARTING:
            self._life.generation.log.warning(
                "not ready %g s after the start: nothing is accepted; %s",
                self._settings.ready_timeout,
                f"waiting for {readiness.names()}" if readiness.is_awaited else "nobody has called ready()",
            )

    async def finished(self) -> None:
        """Return when this generation shall leave: its successor has settled, or the service is to stop.

        Leaving the block then drains.

        Raises:
            RuntimeError: the block was not entered.
        """
        await self._life.finished.wait()

    async def serve_forever(self) -> None:
        """Announce readiness, then return when this generation shall leave: ``ready()`` and ``finished()``.

        Servers that are being started beside it (``servers.uvicorn.serve`` and the like) are waited for first.

        Raises:
            OSError, RuntimeError: see :meth:`ready`. TimeoutError: a server did not get ready in time.
        """
        await self._announce_with_others()
        await self.finished()

    # Restarting and stopping

    async def restart(self, until: Literal["serving", "settled", "drained"] = "serving") -> RestartReport:
        """Restart this service: start a successor, hand the sockets over, and let it serve.

        Args:
            until: how far to wait: until the successor serves, until that is final, or until this generation's
                connections have drained as well.

        Returns:
            The report, which goes on being filled in until the drain has ended.

        Raises:
            RestartInProgress: another restart has not ended.
            NotReady: this generation does not serve yet.
            RestartWhileDraining: it is leaving.
            RestartUnsupported: not from this process, or not on this platform.
            SpawnFailed, SuccessorFailed, ReadyTimeout: there is no successor, and nothing has changed.
            RolledBack: the successor failed after it had begun to serve; this generation accepts again.
            RuntimeError: ``until="drained"`` from a connection that the drain would wait for.

        Cancelling it calls the restart off, as long as the successor was not told to accept; later it only stops
        waiting.
        """
        if until not in ("serving", "settled", "drained"):
            raise ValueError(f'until is "serving", "settled" or "drained", not {until!r}')
        if until == "drained" and current_connection.get() is not None:
            raise RuntimeError(
                'until="drained" from a connection of this generation would wait for itself: '
                'use until="settled", or ask from outside'
            )
        return await self._life.management.restart(until, self._restarts.restart)

    def stop(self, partial: bool = False) -> None:  # noqa: FBT001, FBT002 - the name ecdysis' users know
        """Stop the service: accept no more, and let ``finished()`` return; leaving the block then drains.

        A restart that is under way is called off, or its successor is stopped as well. Before ``ready()`` the body of
        the block is cancelled, as it is in a successor that shall not come; what follows after the block goes on.

        Args:
            partial: leave it to the application to tell the service manager that the service stops.
        """
        self._life.management.stop(functools.partial(self._leaving.stop, Stop.PARTIAL if partial else Stop.ASKED))

    def until_draining(self, awaitable: Awaitable[T]) -> Coroutine[Any, Any, T]:
        """Await something that is safe to cancel, at a point where this connection may also end.

        ``StreamReader.readline`` is safe to cancel, ``loop.sock_recv`` is not: what it has received is lost.

        Returns:
            Its result, also where it is finished at the very moment the drain wants to end.

        Raises:
            DrainInterrupt: the connection should say goodbye and close. It is raised shortly before the deadline,
                because closing an idle connection races with the client's next request.
        """
        return self._tracker.until_draining(awaitable)

    def transfer(self, state: Any = None) -> Coroutine[Any, Any, None]:
        """Offer the connection of the running handler to the successor, when ``until_draining`` was interrupted.

        It returns where the connection stays here, to be served as before. That is so where its server has no
        ``resume=``, with TLS, and where there is no successor or it cannot go on with it. Nothing may be half written,
        and no read may be under way. What asyncio's and anyio's streams have buffered moves along; what the handler
        itself has read belongs into the state.

        Args:
            state: what ``resume`` is called with in the successor, beside the stream: anything that JSON can hold.

        Raises:
            DrainInterrupt: the handler shall end. Either the connection has moved (``moved``: whatever is written has
                nobody to go to), or it is time to say goodbye.
            TypeError, ValueError: the state is no JSON.
        """
        return self._tracker.transfer(state)

    def track(self) -> AbstractAsyncContextManager[None]:
        """Let the drain wait for work of the application's own: ``async with ecdysis.track():``.

        Raises:
            DrainInterrupt: at its end, where the deadline has cancelled the work.
        """
        return self._tracker.track()

    def exclusive(self, name: str) -> AbstractAsyncContextManager[None]:
        """Hold what one process of the whole service holds at a time: ``async with ecdysis.exclusive("scheduler"):``.

        Of all workers and all generations one has it. The others wait. It is passed on when its holder leaves the
        block, begins to drain, or dies, however that comes.

        When this generation begins to drain, the body is cancelled, and what follows the block goes on. The lock is
        given back once the body has ended, so that its clean-up is done before the next process begins. What shall not
        be cut short is shielded: ``with anyio.CancelScope(shield=True):``. A restart that fails cancels nothing: this
        generation has held it all the while.

        Where this generation leaves while somebody waits here, the waiting lasts until its connections have ended, and
        ``DrainInterrupt`` is raised then, which the block of the ``Ecdysis`` lets pass. A task of an application that a
        server runs goes on waiting, because the application cancels its tasks when it shuts down.

        Cancellation while waiting gives up the place in the queue.

        Args:
            name: what is held, in 1 to 200 printable characters. Each name is held by itself.

        Raises:
            DrainInterrupt: see above.
            RuntimeError: the running task holds it already; or this process is a worker, and its anchor of a release
                that does not know of it.
            StartupError: the start-up of this generation waits for what another process keeps until it leaves. An old
                generation leaves only once this one serves, and another worker does not at all.
            TypeError, ValueError: the name.
        """
        check_name(name)
        exclusives = self._life.exclusives
        assert exclusives is not None
        return exclusives.hold(name)

    # What is left to the next generation

    def stash(
        self,
        name: str,
        producer: Producer,
        at: At | Literal["start", "commit"],
        version: Version = 0,
        *,
        keep: bool = False,
    ) -> None:
        """Leave state to the next generation: at each restart it is made anew, and read in ``inherited_stash`` there.

        A restart that fails discards it. What the bytes mean is the application's business, and a release may be
        followed by an older one: the version says which format they are in.

        Args:
            name: what the successor finds it by, and ignores where it does not know it.
            producer: returns bytes, or anything else with a buffer, or yields them in pieces; it may be async. It is
                called on the loop, so that what it reads cannot change meanwhile; each piece is written in a thread
                while the loop goes on, and must not be changed until the next one is asked for. One that computes for
                long should yield pieces, or do so in a thread of its own.
            at: ``"start"``: it is made while the successor starts, within ``ready_timeout``, and can be read there
                from its first line on. ``"commit"``: it is made once this generation accepts no more, and can be read
                there after ``ready()``. New connections wait meanwhile, for 10 seconds at the most; what those of this
                generation change later is not in it.
            version: travels with it.
            keep: whether systemd keeps the last one that was made (``FileDescriptorStoreMax=``, systemd 254). The start
                after a crash, or a kill, then finds it in ``inherited_stash``. It is as old as the last restart, and
                one start is given it: a start that it kills is followed by one without. Ask for it before ``ready()``:
                what a crash has left under a name that nobody keeps then is let go. An orderly stop drops it. It does
                nothing in workers of ``ecdysis run``.

        Raises:
            ValueError, TypeError: an argument is not what it should be, or there is a stash of this name.

        A producer that raises, or takes too long, fails the restart with ``StashFailed``; this generation goes on.
        """
        self._stashes.add(name, producer, at, version, keep=keep)

    @property
    def inherited_stash(self) -> InheritedStash:
        """What the predecessor has left to this generation, by name; empty in the first one, but for a crash's."""
        return self._inherited_stash
