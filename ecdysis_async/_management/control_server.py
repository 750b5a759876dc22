"""The control socket: how a command outside asks a generation for its status, a restart, or its end.

The control socket is a registered listener like any other: it moves to the successor at the commit. A client that was
accepted before is served to its end by the generation that has accepted it. The server knows nothing of the service but
what :class:`ControlHandlers` passes on. A client, however slow or hostile, costs the service one of a few places here.

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
    {"command": "upgrade"}                       {"event": "phase", …} …, {"event": "accepted", "upgrades": …,
                                                 "control": where the next code is asked}, or {"event": "failed", …};
                                                 then the "anchor" of the status tells
    {"command": "takeover"}                      {"event": "accepted", "id": …, "pid": …}, with the successor's end of a
                                                 channel as its descriptor; or {"event": "failed", "error": …, …}

What cannot be served is answered by ``{"event": "error", "message": …}``. The last line ends the connection; a client
that leaves earlier changes nothing of what it has asked for.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import anyio

from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._accepting.gated_socket import AcceptingEnded, GatedSocket, accept_connection
from ecdysis_async._handoff.preflight import with_link
from ecdysis_async._sockets.addresses import Unix
from ecdysis_async._sockets.entry import Entry, Until
from ecdysis_async._sockets.registry import Registry
from ecdysis_async._system.process import Child, Process
from ecdysis_async._system.threads import run_in_thread
from ecdysis_async.errors import RestartError, SpawnFailed
from ecdysis_async.report import RestartReport

from .control_access import ControlAccess
from .control_connection import ClientGone, ControlConnection
from .control_path import ControlLock, prepare_directory
from .controlled import ControlHandlers, ReadyUpgrade

__all__ = ["NAME", "ControlServer", "obtain_control_socket"]

T = TypeVar("T")

logger = logging.getLogger("ecdysis_async")

# What the control socket is inherited by.
NAME = "ecdysis control"

# How long a client may take over its request, seconds.
REQUEST_SECONDS = 10.0
MAX_CLIENTS = 32

# How long the file system may take over what a status says of it, seconds.
LOOK_UP_SECONDS = 1.0

# How often a client that waits for a restart, or for the end, hears something at least, seconds. A drain counts down,
# and silence means that the service hangs.
HEARTBEAT_SECONDS = 1.0

# How long the end of the service waits for its last answers to be read, seconds.
FAREWELL_SECONDS = 1.0


class ControlServer:
    """The control socket of one generation.

    Args:
        path: absolute.
        plane: where it is registered.
        controlled: whom it speaks for.
        access: who may command it.
    """

    def __init__(
        self, path: str, plane: DataPlane, controlled: ControlHandlers, access: ControlAccess | None = None
    ) -> None:
        self.path = path
        self._access = access if access is not None else ControlAccess()
        self.controlled = controlled
        self._ending = anyio.Event()
        self._plane = plane
        self._lock = ControlLock(path)
        # There where somebody has removed the path; set once another socket is bound, which is not used yet.
        self._renewed: anyio.Event | None = None
        # Why the socket could not be made anew, so that each reason is logged once.
        self._told = ""
        self._clients = 0
        # Clients that have not said what they want, the oldest first.
        self._silent: dict[ControlConnection, anyio.CancelScope] = {}
        # How many clients have asked for something and have not heard yet what became of it.
        self._waiting = 0
        self._nobody_waits = anyio.Event()
        # A check takes a process, so there is one at a time.
        self._is_checking = False

    async def open(self) -> None:
        """Take the lock, and register the socket: the predecessor's, or a new one in the place of a stale one.

        Raises:
            OSError: a live service has it, or its directory is not safe; the text says what to do.
        """
        self._entry = await run_in_thread(self._open)

    async def run(self) -> None:
        """Answer clients, between the commit and the pause those that come, to the end those that are there."""
        self._listener = GatedSocket(self._entry, plane=self._plane)
        async with anyio.create_task_group() as clients:
            while True:
                try:
                    # The connection is not tracked: a client that looks on (`ecdysis status --watch`) holds no drain.
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
        """Make the socket anew where somebody has removed it, as soon as that can be done.

        Call it while ``run`` runs, in a process that serves the socket as long as the service lives. Other processes
        make it anew with their next restart.
        """
        # While it is being renewed the former socket is closed, and its inode's number may be another file's by now.
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
            # A socket that cannot be seen may well be there.
            return isinstance(error, FileNotFoundError)
        return (found.st_dev, found.st_ino) != self._entry.inode

    async def retire(self) -> None:
        """Answer nobody who comes from now on, and take the socket away: commands find the service elsewhere."""
        # The path of a file system that is read-only by now stays; nobody listens there.
        with contextlib.suppress(OSError):
            self._entry.refuse_newcomers()
        await self._listener.aclose()
        self._lock.release()

    async def finish(self) -> None:
        """Tell the clients that wait for the end. They get a moment to read it, and no more."""
        self._ending.set()
        with anyio.move_on_after(FAREWELL_SECONDS):
            while self._waiting:
                self._nobody_waits = anyio.Event()
                await self._nobody_waits.wait()

    def close(self) -> None:
        """Give the lock back. The registry closes the socket."""
        self._lock.release()

    def _open(self) -> Entry:
        return obtain_control_socket(self.path, self._access, self._lock, self._plane.registry)

    @contextlib.contextmanager
    def _place(self) -> Iterator[bool]:
        """Give a client a place: where all are taken, the place of the client that has been silent for longest."""
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
            client = ControlConnection(sock)
            try:
                if not self._access.admits(sock):
                    await client.send("error", reason="permission", message=self._access.refusal(sock))
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

    async def _answer(self, client: ControlConnection) -> None:
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
                found: dict[str, Any] = {}
                # A file system that hangs leaves these questions open, and no other.
                with anyio.move_on_after(LOOK_UP_SECONDS):
                    found = await self.controlled.look_up()
                await client.send("status", status={**self.controlled.status(), **found})
            case {"command": "verdict", "id": str(id)}:
                report = self.controlled.find_report(id)
                if report is None:
                    await client.send("unknown")
                else:
                    await client.send("verdict", report=report.to_json())
            case {"command": "restart", "until": "serving" | "settled" | "drained" as until, **others}:
                await self._restart(client, until, client.describe(others.get("by")))
            case {"command": "stop"}:
                await self._stop(client)
            case {"command": "check"}:
                await self._check(client)
            case {"command": "compare", "release": dict(release)}:
                try:
                    comparison = self.controlled.compare(release)
                except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
                    await client.send("error", message=f"this does not describe a release: {error!r}")
                else:
                    await client.send("checked", comparison=await with_link(comparison))
            case {"command": "upgrade"}:
                await self._upgrade(client)
            case {"command": "takeover"} if not ControlAccess().admits(client.sock):
                # The sockets, and the processes behind them, are more than a word of command.
                await client.send(
                    "error", reason="permission", message=f"only uid {os.geteuid()} and root may take this service over"
                )
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

    async def _restart(self, client: ControlConnection, until: str, asked_by: str) -> None:
        try:
            restart = self.controlled.begin_restart(asked_by)
        except RestartError as error:
            logger.info("a restart is refused, which %s asks for: %s", asked_by, error)
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

    async def _check(self, client: ControlConnection) -> None:
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

    async def _pass_on(self, client: ControlConnection) -> None:
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
            restart = self.controlled.begin_takeover(pass_channel, f"a takeover by pid {pid}")
            with self._until_told():
                await restart.wait("serving")
        except RestartError as error:
            # Once it has the channel, it is told there.
            if not is_passed:
                await client.send("failed", **_describe(error), report=None)
        finally:
            # Once the channel is passed on, the process belongs to the restart, which needs it until its end.
            if not is_passed:
                newcomer.close()

    async def _pass_all_on(self, client: ControlConnection) -> None:
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

    async def _upgrade(self, client: ControlConnection) -> None:
        ready: ReadyUpgrade | None = None

        async def wait() -> None:
            nonlocal ready
            ready = await self.controlled.upgrade()

        upgrades = self.controlled.status().get("anchor", {}).get("upgrades", 0)
        try:
            await self._accompany(client, wait, None)
            # The connection ends with the exec. The status tells what has become of the upgrade.
            control = ready.control_path if ready is not None else None
            await client.send("accepted", pid=os.getpid(), upgrades=upgrades, control=control)
        except RestartError as error:
            await client.send("failed", **_describe(error), report=None)
        finally:
            # As with a restart, it begins whether or not the client is still there to hear of it.
            if ready is not None:
                ready.begin()

    async def _stop(self, client: ControlConnection) -> None:
        with self._until_told():
            # As with a restart, it begins whether or not the client is still there to hear of it.
            self.controlled.stop()
            await client.send("accepted", pid=os.getpid())
            await self._accompany(client, self._ending.wait, None)
            await client.send("done")

    async def _accompany(
        self, client: ControlConnection, wait: Callable[[], Awaitable[T]], report: RestartReport | None
    ) -> T:
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


def obtain_control_socket(path: str, access: ControlAccess, lock: ControlLock, registry: Registry) -> Entry:
    """Take the lock, and register the socket: an inherited one, or a new one in the place of a stale one.

    Raises:
        OSError: a live service has it, or its directory is not safe; the text says what to do.
    """
    prepare_directory(path, is_shared=access.group is not None)
    is_family = any(entry.inherited and (entry.name, entry.address) == (NAME, path) for entry in registry.entries)
    lock.acquire(is_family=is_family)
    try:
        entry = registry.obtain(Unix(path, mode=access.mode, group=access.group), name=NAME, until=Until.EXIT)
        if entry.inherited:
            access.apply(path)
    except PermissionError as error:
        if access.group is None:
            raise
        raise PermissionError(
            error.errno,
            f"the control socket {path} cannot be given to group {access.group} ({error.strerror}): only "
            "root, and who is in that group, can do that",
        ) from error
    if (obstacle := access.find_obstacle(path)) is not None:
        logger.warning(
            "group %d cannot reach the control socket: it may not pass %s (chmod g+x, or take another directory)",
            access.group,
            obstacle,
        )
    return entry


def _describe(error: RestartError) -> dict[str, Any]:
    return {"error": type(error).__name__, "message": str(error), "phase": error.phase}
