"""The control socket: how a command outside asks a generation for its status, a restart, or its end.

The control socket is a registered listener like any other: it moves to the successor at the commit, and a client that
was accepted before is served to the end by the generation that accepted it. The server knows nothing of the service
but what :class:`ControlHandlers` passes on, and no client, however slow or hostile, may cost the service more than one
of a few places here.

One request a connection, each message one line of JSON::

    {"command": "status"}                        {"event": "status", "status": {…}}
    {"command": "restart", "until": "settled"}   {"event": "accepted", "id": …}, {"event": "phase", "report": {…}, …} …,
                                                 {"event": "done", "report": {…}}, or {"event": "failed", "error": …, …}
    {"command": "verdict", "id": …}              {"event": "verdict", "report": {…}}, or {"event": "unknown"}
    {"command": "stop"}                          {"event": "accepted", "pid": …}, {"event": "phase", …} …,
                                                 {"event": "done"}
    {"command": "reopen-logs"}                   {"event": "reopened", "handlers": …}
    {"command": "check"}                         {"event": "phase", …} …, {"event": "checked", "comparison": {…}}, or
                                                 {"event": "failed", "error": …, …}
    {"command": "compare", "release": {…}}       {"event": "checked", "comparison": {…}}
    {"command": "upgrade"}                       {"event": "phase", …} …, {"event": "accepted", "upgrades": …}, or
                                                 {"event": "failed", …}; then the "anchor" of the status tells
    {"command": "takeover"}                      {"event": "accepted", "id": …, "pid": …}, with the successor's end of a
                                                 channel as its descriptor; or {"event": "failed", "error": …, …}

What cannot be served is answered by ``{"event": "error", "message": …}``. The last line ends the connection; a client
that leaves earlier changes nothing of what it has asked for.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._accepting.gated_socket import AcceptingEnded, GatedSocket, accept_connection
from ecdysis_async._handoff.generation import Spawner
from ecdysis_async._sockets.registry import Entry, Until
from ecdysis_async._system.process import Child, Process
from ecdysis_async._system.threads import run_in_thread
from ecdysis_async.errors import RestartError, RestartUnsupported, SpawnFailed
from ecdysis_async.report import RestartReport

from .control_path import ControlLock, prepare_directory

__all__ = ["Changes", "ControlHandlers", "ControlServer", "Restart"]

T = TypeVar("T")

logger = logging.getLogger("ecdysis_async")

# What the control socket is inherited by.
NAME = "ecdysis control"

MAX_REQUEST_BYTES = 64 * 1024
# How long a client may take over its request, and over reading one answer, seconds.
REQUEST_SECONDS = 10.0
ANSWER_SECONDS = 5.0
MAX_CLIENTS = 32

# Those who wait for a restart, or for the end, hear something at least this often, seconds: a drain counts down, and
# silence means that the service hangs.
HEARTBEAT_SECONDS = 1.0

# How long the end of the service waits for its last answers to be read, seconds.
FAREWELL_SECONDS = 1.0

# socket(7), since Linux 6.5; the module socket does not have it.
SO_PEERPIDFD = 77

# struct ucred of unix(7): pid, uid, gid.
CREDENTIALS = struct.Struct("@iII")


class Changes:
    """Something that changes again and again."""

    def __init__(self) -> None:
        self._next = anyio.Event()

    def announce(self) -> None:
        """Wake those who wait for the next change."""
        self._next.set()
        self._next = anyio.Event()

    def next(self) -> anyio.Event:
        """Return what will be set at the next change; ask before looking, and no change is missed."""
        return self._next


@dataclass(frozen=True, slots=True)
class Restart:
    """A restart that has begun.

    Attributes:
        report: what stands so far; it grows.
        wait: waits until it is "serving", "settled" or "drained", and returns the report or raises a ``RestartError``;
            cancelling the wait does not call the restart off.
    """

    report: RestartReport
    wait: Callable[[str], Awaitable[RestartReport]]


async def _refuse_anchor(channel: socket.socket, accept: Callable[[], None]) -> None:
    raise RestartUnsupported(
        "this service has no anchor that another one (`ecdysis run --takeover`) could take the place of: take it over "
        "by Ecdysis(takeover=...), or stop it"
    )


def _refuse_takeover(spawner: Spawner) -> Restart:
    raise RestartUnsupported(
        "a service of `ecdysis run` can be taken over by `ecdysis run --takeover` alone: both have an anchor, which "
        "Ecdysis(takeover=...) has not"
    )


async def _refuse_upgrade() -> Callable[[], None]:
    raise RestartUnsupported(
        "this service has no anchor, which only `ecdysis run` has: restart it without --anchor, and the new generation "
        "runs the new code"
    )


@dataclass(frozen=True, slots=True)
class ControlHandlers:
    """What can be asked of a generation.

    Attributes:
        status: tells where it stands, as an object of JSON.
        waiting_for: tells what it waits for, in words; None if for nothing.
        begin_restart: begins a restart, or raises a ``RestartError``.
        find_report: returns the report of a restart by its id, where it is known here.
        stop: stops the service.
        changes: announces each change of the status.
        reopen_logs: lets log files that were moved be opened anew; returns how many.
        begin_takeover: begins a restart whose successor is not started, but passed on to; or raises a
            ``RestartError``.
        check: starts what a restart would start, to tell what that would change; or raises a ``RestartError``.
        compare: tells what a restart into a release would change, which has told of itself elsewhere.
        workers: tells of each worker, where there are several, an object with "slot" and "waiting_for", what its
            restart or its drain waits for at this moment.
        pass_all_on: hands everything over to another anchor, at the end of the channel that it is given, which is to
            be told before, and does not return; or raises a ``RestartError``.
        upgrade: sees that the new code of the anchor takes over from this one, and returns what makes it do so; or
            raises a ``RestartError``.
    """

    status: Callable[[], dict[str, Any]]
    waiting_for: Callable[[], str | None]
    begin_restart: Callable[[], Restart]
    find_report: Callable[[str], RestartReport | None]
    stop: Callable[[], None]
    changes: Changes
    reopen_logs: Callable[[], Awaitable[int]]
    check: Callable[[], Awaitable[dict[str, Any]]]
    compare: Callable[[dict[str, Any]], dict[str, Any]]
    begin_takeover: Callable[[Spawner], Restart] = _refuse_takeover
    workers: Callable[[], list[dict[str, Any]]] = list
    upgrade: Callable[[], Awaitable[Callable[[], None]]] = _refuse_upgrade
    pass_all_on: Callable[[socket.socket, Callable[[], None]], Awaitable[None]] = _refuse_anchor


class ControlServer:
    """The control socket of one generation.

    Args:
        path: absolute.
        plane: where it is registered.
        controlled: whom it speaks for.
    """

    def __init__(self, path: str, plane: DataPlane, controlled: ControlHandlers) -> None:
        self.path = path
        self.controlled = controlled
        self._ending = anyio.Event()
        self._plane = plane
        self._lock = ControlLock(path)
        # Where the path was removed: set once there is another socket, which is not used yet.
        self._renewed: anyio.Event | None = None
        # Why it could not be made anew, as far as that was said.
        self._told = ""
        self._clients = 0
        # Those that have not said what they want, the oldest first.
        self._silent: dict[_Client, anyio.CancelScope] = {}
        # How many have asked for something and have not heard yet what became of it.
        self._waiting = 0
        self._nobody_waits = anyio.Event()
        # It takes a process each, so there is one at a time.
        self._is_checking = False

    async def open(self) -> None:
        """Take the lock, and register the socket: the predecessor's, or a new one in the place of a stale one.

        Raises:
            OSError: a live service has it, or its directory is not safe; the text says what to do.
        """
        self._entry = await anyio.to_thread.run_sync(self._open)

    async def run(self) -> None:
        """Answer clients, between the commit and the pause those that come, to the end those that are there."""
        self._listener = GatedSocket(self._entry, plane=self._plane)
        async with anyio.create_task_group() as clients:
            while True:
                try:
                    # Not tracked, because who looks on (`ecdysis status --watch`) must not hold a drain.
                    sock = await self._listener.take(accept_connection)
                except AcceptingEnded:
                    if self._renewed is None:
                        return
                    await self._renewed.wait()
                    self._renewed = None
                    self._listener = GatedSocket(self._entry, plane=self._plane)
                    continue
                except OSError:
                    logger.exception("the control socket %s is out of service", self.path)
                    return
                clients.start_soon(self._serve, sock)

    async def renew(self) -> None:
        """Make the socket anew where somebody has removed it, as soon as that can be done. Only while ``run`` runs.

        For a process that serves it for as long as the service lives; others do so with their next restart.
        """
        # Where it is being renewed the former socket is closed, and its inode's number may be another one's by now.
        if not self._is_removed() if self._renewed is None else self._renewed.is_set():
            return
        try:
            await run_in_thread(functools.partial(prepare_directory, self.path))
            if self._renewed is None:
                self._renewed = anyio.Event()
                await self._listener.aclose()
            if self._lock.is_removed():
                self._lock.release()
            self._entry = await run_in_thread(self._open)
            self._entry.start_listening()
        except OSError as error:
            why = error.strerror or str(error)
            if error.errno == errno.EADDRINUSE:
                why = (
                    "another service has it now, which is left alone: until that one ends, no command reaches this one "
                    f"(pid {os.getpid()}); give one of them another control_socket"
                )
            if why != self._told:
                self._told = why
                logger.warning("the control socket %s was removed: %s", self.path, why)
            return
        self._told = ""
        self._renewed.set()
        logger.warning("the control socket %s was removed by somebody, and is there again", self.path)

    def _is_removed(self) -> bool:
        try:
            found = os.lstat(self.path)
        except OSError as error:
            # Where it cannot be seen, it may well be there.
            return isinstance(error, FileNotFoundError)
        return (found.st_dev, found.st_ino) != self._entry.inode

    async def finish(self) -> None:
        """Let those who wait for the end hear of it. They get a moment for that, and no more."""
        self._ending.set()
        with anyio.move_on_after(FAREWELL_SECONDS):
            while self._waiting:
                self._nobody_waits = anyio.Event()
                await self._nobody_waits.wait()

    def close(self) -> None:
        """Give the lock back. The socket is the registry's."""
        self._lock.release()

    def _open(self) -> Entry:
        registry = self._plane.registry
        prepare_directory(self.path)
        is_family = any(
            entry.inherited and (entry.name, entry.address) == (NAME, self.path) for entry in registry.entries
        )
        self._lock.acquire(is_family=is_family)
        return registry.listen_unix(self.path, name=NAME, until=Until.EXIT, mode=0o600)

    @contextlib.contextmanager
    def _place(self) -> Iterator[bool]:
        """Give a client a place; where all are taken, that of the one that has been silent for longest."""
        if self._clients >= MAX_CLIENTS and self._silent:
            self._silent.pop(next(iter(self._silent))).cancel()
        elif self._clients >= MAX_CLIENTS:
            yield False
            return
        self._clients += 1
        try:
            yield True
        finally:
            self._clients -= 1

    async def _serve(self, sock: socket.socket) -> None:
        """Serve one client to its end; nothing that it does ends anything else."""
        with sock:
            client = _Client(sock)
            try:
                if (uid := client.read_uid()) not in (0, os.geteuid()):
                    await client.send(
                        "error",
                        message=f"uid {uid} may not control a service of uid {os.geteuid()}: ask as that user, or root",
                    )
                    return
                with self._place() as has_place:
                    if has_place:
                        await self._answer(client)
                    else:
                        await client.send("error", message=f"{MAX_CLIENTS} others ask already: try again later")
            except ClientGone as error:
                logger.debug("a client of the control socket is let go: %r", error.__cause__ or error)
            except Exception as error:
                logger.exception("a request on the control socket failed")
                with contextlib.suppress(ClientGone):
                    await client.send("error", message=f"the service could not do that: {error!r}; see its log")

    async def _answer(self, client: _Client) -> None:
        request = None
        with anyio.move_on_after(REQUEST_SECONDS) as scope:
            self._silent[client] = scope
            try:
                request = await client.receive()
            except ValueError as error:
                await client.send("error", message=f"this is no request, but one JSON object in a line is: {error}")
                return
            finally:
                self._silent.pop(client, None)
        if scope.cancelled_caught:
            await client.send("error", message=f"no request came within {REQUEST_SECONDS:g} seconds, or others wait")
            return
        match request:
            case {"command": "status"}:
                await client.send("status", status=self.controlled.status())
            case {"command": "verdict", "id": str(id)}:
                report = self.controlled.find_report(id)
                if report is None:
                    await client.send("unknown")
                else:
                    await client.send("verdict", report=report.to_json())
            case {"command": "restart", "until": "serving" | "settled" | "drained" as until}:
                await self._restart(client, until)
            case {"command": "stop"}:
                await self._stop(client)
            case {"command": "check"}:
                await self._check(client)
            case {"command": "compare", "release": dict(release)}:
                try:
                    comparison = self.controlled.compare(release)
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    await client.send("error", message=f"this does not describe a release: {error!r}")
                else:
                    await client.send("checked", comparison=comparison)
            case {"command": "upgrade"}:
                await self._upgrade(client)
            case {"command": "takeover", "anchor": int()}:
                await self._pass_all_on(client)
            case {"command": "takeover"}:
                await self._pass_on(client)
            case {"command": "reopen-logs"}:
                await client.send("reopened", handlers=await self.controlled.reopen_logs())
            case _:
                await client.send(
                    "error",
                    message='there is no such request: "command" is "status", "restart" (with "until": "serving", '
                    '"settled" or "drained"), "verdict" (with "id"), "stop", "reopen-logs", "check", '
                    '"compare" (with "release") or "takeover"',
                )

    async def _restart(self, client: _Client, until: str) -> None:
        try:
            restart = self.controlled.begin_restart()
        except RestartError as error:
            await client.send("failed", **_describe(error), report=None)
            return
        with self._until_told():
            await client.send("accepted", id=restart.report.id, pid=os.getpid())
            try:
                await self._accompany(client, functools.partial(restart.wait, until), restart.report)
            except RestartError as error:
                await client.send("failed", **_describe(error), report=restart.report.to_json())
            else:
                await client.send("done", report=restart.report.to_json())

    async def _check(self, client: _Client) -> None:
        if self._is_checking:
            await client.send("error", message="another check is in progress: try again later")
            return
        self._is_checking = True
        facts: dict[str, Any]
        try:
            event, facts = "checked", {"comparison": await self._accompany(client, self.controlled.check, None)}
        except RestartError as error:
            event, facts = "failed", {**_describe(error), "report": None}
        finally:
            self._is_checking = False
        await client.send(event, **facts)

    async def _pass_on(self, client: _Client) -> None:
        """Let the process at the other end be the successor."""
        is_passed = False
        pid, pidfd = client.identify()
        newcomer = Process(pid, pidfd)

        async def pass_channel(channel: socket.socket, stderr: int) -> Child:
            nonlocal is_passed
            try:
                client.send_with(channel, "accepted", id=restart.report.id, pid=os.getpid())
            except ClientGone as error:
                raise SpawnFailed(f"the process that asked for the sockets (pid {pid}) has left") from error
            is_passed = True
            return newcomer

        try:
            restart = self.controlled.begin_takeover(pass_channel)
            with self._until_told():
                await restart.wait("serving")
        except RestartError as error:
            # Later it is told by the channel, which it has.
            if not is_passed:
                await client.send("failed", **_describe(error), report=None)
        finally:
            # Else it belongs to the restart, and is needed until its end.
            if not is_passed:
                newcomer.close()

    async def _pass_all_on(self, client: _Client) -> None:
        """Let the process at the other end be the anchor."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

        def accept() -> None:
            client.send_with(theirs, "accepted", pid=os.getpid())
            theirs.close()

        with ours, theirs:
            try:
                await self.controlled.pass_all_on(ours, accept)
            except RestartError as error:
                await client.send("failed", **_describe(error), report=None)

    async def _upgrade(self, client: _Client) -> None:
        begin: Callable[[], None] | None = None

        async def wait() -> None:
            nonlocal begin
            begin = await self.controlled.upgrade()

        upgrades = self.controlled.status().get("anchor", {}).get("upgrades", 0)
        try:
            await self._accompany(client, wait, None)
            # The connection ends with the exec; what has become of it, the status tells.
            await client.send("accepted", pid=os.getpid(), upgrades=upgrades)
        except RestartError as error:
            await client.send("failed", **_describe(error), report=None)
        finally:
            # Whether or not the client is still there to hear of it: as with a restart.
            if begin is not None:
                begin()

    async def _stop(self, client: _Client) -> None:
        with self._until_told():
            # Whether or not the client is still there to hear of it: as with a restart.
            self.controlled.stop()
            await client.send("accepted", pid=os.getpid())
            await self._accompany(client, self._ending.wait, None)
            await client.send("done")

    async def _accompany(self, client: _Client, wait: Callable[[], Awaitable[T]], report: RestartReport | None) -> T:
        """Tell a client how it goes on, at each change and now and then, until what it waits for has happened.

        Returns:
            What has come of it.

        Raises:
            ClientGone: the client has left, or does not read.
            RestartError: what it has waited for has failed.
        """
        is_over = False
        failure: ClientGone | RestartError | None = None
        results: list[T] = []
        changes = self.controlled.changes

        async def wait_and_announce() -> None:
            nonlocal is_over, failure
            try:
                results.append(await wait())
            except RestartError as error:
                failure = error
            is_over = True
            changes.announce()

        async with anyio.create_task_group() as task_group:
            task_group.start_soon(wait_and_announce)
            try:
                while not is_over:
                    change = changes.next()
                    await client.send(
                        "phase",
                        waiting_for=self.controlled.waiting_for(),
                        workers=self.controlled.workers(),
                        report=report.to_json() if report is not None else None,
                    )
                    with anyio.move_on_after(HEARTBEAT_SECONDS):
                        await change.wait()
            except ClientGone as error:
                failure = error
                task_group.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return results[0]

    @contextlib.contextmanager
    def _until_told(self) -> Iterator[None]:
        """Let the end of this generation wait until somebody has heard what became of it."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._nobody_waits.set()


class ClientGone(Exception):
    """A client has left, or does not read: it will hear nothing more, and that is no fault of the service."""


class _Client:
    """One connection, each of its messages a line of JSON."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def read_uid(self) -> int:
        """Return the user who connected, as the kernel saw it then (SO_PEERCRED, unix(7))."""
        credentials = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        uid: int = CREDENTIALS.unpack(credentials)[1]
        return uid

    def identify(self) -> tuple[int, int]:
        """Return the process that connected, and a new pidfd of it.

        Raises:
            ClientGone: it has ended. ValueError: it cannot be watched from here.
        """
        credentials = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        pid: int = CREDENTIALS.unpack(credentials)[0]
        if pid == 0:
            raise ValueError("it is in another pid namespace (another container)")
        with contextlib.suppress(OSError):  # Linux before 6.5, or a peer that was reaped
            return pid, self._sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise ClientGone from error
        # It was there after its number was looked up, so that nobody else has got the number.
        if self.has_left():
            os.close(pidfd)
            raise ClientGone("it has ended")
        return pid, pidfd

    def has_left(self) -> bool:
        """Say whether it has closed its end, or said something more than its request."""
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def send_with(self, passed: socket.socket, event: str, **facts: Any) -> None:
        """Send the first message, for which there is room, and a duplicate of a socket with it.

        Raises:
            ClientGone: it has left.
        """
        line = json.dumps({"event": event, **facts}).encode() + b"\n"
        try:
            socket.send_fds(self._sock, [line], [passed.fileno()])
        except OSError as error:
            raise ClientGone from error

    async def receive(self) -> Any:
        """Wait for its request: a line, or what it had said when it said that there will be no more.

        Raises:
            ValueError: it is no JSON, or too long. ClientGone: it has left without one.
        """
        line = bytearray()
        while b"\n" not in line:
            if len(line) > MAX_REQUEST_BYTES:
                raise ValueError(f"it is longer than {MAX_REQUEST_BYTES} bytes")
            try:
                data = self._sock.recv(MAX_REQUEST_BYTES)
            except BlockingIOError:
                await anyio.wait_readable(self._sock)
                continue
            except OSError as error:
                raise ClientGone from error
            if not data and not line:
                raise ClientGone("it left without a request")
            if not data:
                break
            line += data
        try:
            return json.loads(line.partition(b"\n")[0])
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error

    async def send(self, event: str, **facts: Any) -> None:
        """Send a message.

        Raises:
            ClientGone: it has left, or it does not read.

        Cancelled, half of it may be sent: nothing can follow.
        """
        rest = memoryview(json.dumps({"event": event, **facts}).encode() + b"\n")
        try:
            with anyio.fail_after(ANSWER_SECONDS):
                while rest:
                    try:
                        rest = rest[self._sock.send(rest) :]
                    except BlockingIOError:
                        await anyio.wait_writable(self._sock)
        except OSError as error:
            raise ClientGone from error


def _describe(error: RestartError) -> dict[str, Any]:
    return {"error": type(error).__name__, "message": str(error), "phase": error.phase}
