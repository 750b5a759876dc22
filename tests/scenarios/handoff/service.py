"""The service that the process tests restart: it answers lines of JSON, tells what happens to it, and fails as told.

Run as ``service.py SETTINGS``, a file of JSON that each generation reads afresh (harness.py writes it). Nothing here
asserts anything, and nothing of the library is replaced: what is wrapped does what it always does, and then acts upon
its own process, or its peer's, with real signals.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import itertools
import json
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.abc
from anyio.streams.buffered import BufferedByteReceiveStream

import ecdysis_async
from ecdysis_async._connections.connection import Connection
from ecdysis_async._connections.tracker import Tracker
from ecdysis_async._handoff import predecessor as handover
from ecdysis_async._handoff import successor_process
from ecdysis_async._handoff.predecessor import PredecessorSide
from ecdysis_async._handoff.successor import SuccessorSide
from ecdysis_async._service.ecdysis import Ecdysis
from ecdysis_async.errors import DrainInterrupt, RestartError

MAX_LINE = 1024 * 1024

with open(sys.argv[1], encoding="utf-8") as settings_file:
    SETTINGS: dict[str, Any] = json.load(settings_file)

# What planted code, and requests to evaluate some, can reach.
NAMESPACE: dict[str, Any] = {"os": os, "sys": sys, "anyio": anyio, "socket": socket, "ecdysis_async": ecdysis_async}

EVENTS = os.open(SETTINGS["events"], os.O_WRONLY | os.O_CLOEXEC)
GATE = os.open(SETTINGS["gate"], os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
ACCEPTS = os.open(SETTINGS["accepts"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def tell(event: str, **facts: Any) -> None:
    """Tell the test something; short enough to be written in one piece (PIPE_BUF)."""
    os.write(EVENTS, json.dumps({"event": event, "pid": os.getpid(), **facts}).encode() + b"\n")


async def run_code(source: str, **names: Any) -> Any:
    """Run code of the test's own and return what its last expression gives; it may await."""
    NAMESPACE.update(names)
    tree = ast.parse(source)
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    parts: list[Any] = [compile(ast.Module(tree.body[:-1], []), "<planted>", "exec", flags)]
    match tree.body[-1:]:
        case [ast.Expr(value=last)]:
            parts.append(compile(ast.Expression(last), "<planted>", "eval", flags))
        case rest:
            parts.append(compile(ast.Module(rest, []), "<planted>", "exec", flags))
    result = None
    for part in parts:
        result = eval(part, NAMESPACE)
        if inspect.isawaitable(result):
            result = await result
    return result


# Waiting for the test


def block() -> None:
    """Stop this thread until the test lets it go on."""
    tell("blocked")
    os.set_blocking(GATE, True)
    os.read(GATE, 1)
    os.set_blocking(GATE, False)


async def wait() -> None:
    """Wait until the test lets this task go on."""
    tell("waiting")
    await anyio.wait_readable(GATE)
    os.read(GATE, 1)


NAMESPACE |= {"block": block, "wait": wait, "tell": tell}


# Faults


SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}


def act(side: str, state: str, peer: int | None) -> None:
    """Do what the test has armed for this state: once, in whichever generation comes there first."""
    for what, whom in itertools.product(SIGNALS, ("self", "peer")):
        action = f"{what}-{whom}"
        try:
            # Not listed, which takes a descriptor: some tests leave none.
            os.unlink(os.path.join(SETTINGS["faults"], f"{side}.{state}.{action}"))
        except FileNotFoundError:
            continue
        target = os.getpid() if whom == "self" else peer
        assert target is not None
        if whom == "self":
            tell("fault", side=side, state=state, action=action, target=target)
            os.kill(target, SIGNALS[what])
        else:
            # Before it is told: a test that hears of it may let the other process go on, which would not be seen here.
            harm(target, what)
            tell("fault", side=side, state=state, action=action, target=target)


def harm(pid: int, what: str) -> None:
    """Send a process a signal; return when it is dead, or stands still, if that is what the signal is for.

    Between a signal and its effect much may happen on a busy machine: the probation of a successor may end before that
    has had its turn to die. The loop of this process stands still meanwhile.
    """
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, SIGNALS[what])
    match what:
        case "kill":
            select.select([pidfd], [], [])
        case "stop":
            while not is_stopped(pid) and not select.select([pidfd], [], [], 0.001)[0]:
                pass
    os.close(pidfd)


def is_stopped(pid: int) -> bool:
    """Say whether a SIGSTOP has come into effect; proc_pid_stat(5)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2].startswith(b"T")
    except (FileNotFoundError, ProcessLookupError):
        return False


def watch_handoff() -> None:
    """Tell each state of either side, and act there."""
    handover_changed, handover_start = PredecessorSide.changed, PredecessorSide._start
    inheritance_changed, inheritance_greet = SuccessorSide.changed, SuccessorSide.greet

    @functools.wraps(handover_changed)
    def changed_handover(self: PredecessorSide, before: Any, event: Any, cause: object) -> None:
        handover_changed(self, before, event, cause)
        if self.state is not before:
            tell("predecessor", state=self.state.value, generation=self.generation.number)
            act("predecessor", self.state.value, self.report.successor_pid)

    @functools.wraps(handover_start)
    async def start_handover(self: PredecessorSide) -> None:
        await handover_start(self)
        tell("predecessor", state="spawning", generation=self.generation.number, successor=self.report.successor_pid)
        act("predecessor", "spawning", self.report.successor_pid)

    @functools.wraps(inheritance_changed)
    def changed_inheritance(self: SuccessorSide, before: Any, event: Any, cause: object) -> None:
        inheritance_changed(self, before, event, cause)
        if self.state is not before:
            tell("successor", state=self.state.value, generation=self.generation.number)
            act("successor", self.state.value, self.predecessor.pid if self.predecessor is not None else None)

    @functools.wraps(inheritance_greet)
    async def greet_inheritance(self: SuccessorSide) -> None:
        tell("successor", state="greeting")
        act("successor", "greeting", os.getppid())
        await inheritance_greet(self)
        tell("successor", state="initialising", generation=self.generation.number)
        act("successor", "initialising", self.predecessor.pid if self.predecessor is not None else None)

    # One thing after the other, because mypy knows how each of them is called.
    PredecessorSide.changed = changed_handover  # type: ignore[method-assign]
    PredecessorSide._start = start_handover  # type: ignore[method-assign]
    SuccessorSide.changed = changed_inheritance  # type: ignore[method-assign]
    SuccessorSide.greet = greet_inheritance  # type: ignore[method-assign]


def watch_accepts() -> None:
    """Note the moment of each accept where it outlives this process."""
    tracker_open = Tracker.open

    @functools.wraps(tracker_open)
    def open_connection(self: Tracker, connection: Connection) -> None:
        tracker_open(self, connection)
        os.write(ACCEPTS, f"{time.monotonic_ns()} {os.getpid()}\n".encode())

    Tracker.open = open_connection  # type: ignore[method-assign]


# Requests


async def answer(ecdysis: Ecdysis, request: dict[str, Any]) -> Any:
    """Answer one request, except "hold", which needs the connection."""
    match request:
        case {"do": "hello"}:
            return {"generation": ecdysis.generation, "pid": os.getpid()}
        case {"do": "restart"}:
            try:
                return (await ecdysis.restart(request["until"])).to_json()
            except (RestartError, RuntimeError) as error:
                return describe(error)
        case {"do": "run"}:
            return await run_code(request["code"], ecdysis=ecdysis)
        case _:
            raise ValueError(f"no such request: {request!r}")


def describe(error: Exception) -> dict[str, Any]:
    """Put an error into JSON."""
    return {
        "error": type(error).__name__,
        "text": str(error),
        "phase": getattr(error, "phase", None),
        "stderr": getattr(error, "stderr", ""),
        "cause": type(error.__cause__).__name__ if error.__cause__ is not None else None,
    }


async def converse(
    ecdysis: Ecdysis, receive_line: Callable[[], Awaitable[bytes]], send: Callable[[bytes], Awaitable[None]]
) -> None:
    """Serve one connection: a line in, a line out, and a goodbye where the drain asks for it."""
    while True:
        try:
            line = await ecdysis.until_draining(receive_line())
        except DrainInterrupt:
            await send(b'"bye"\n')
            return
        if not line:
            return
        request = json.loads(line)
        if request["do"] == "hold":
            # Busy until the client says so: this is no safe point.
            tell("holding", generation=ecdysis.generation)
            if not await receive_line():
                return
            request = {"do": "hello"}
        await send(json.dumps(await answer(ecdysis, request)).encode() + b"\n")


async def handle_stream(ecdysis: Ecdysis, stream: anyio.abc.SocketStream) -> None:
    """Serve a connection of anyio's."""
    buffered = BufferedByteReceiveStream(stream)

    async def receive_line() -> bytes:
        try:
            return await buffered.receive_until(b"\n", MAX_LINE)
        except (anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError):
            return b""

    # The client may have left without waiting for its answer, or this process be cut at the deadline.
    with contextlib.suppress(anyio.BrokenResourceError):
        await converse(ecdysis, receive_line, stream.send)


async def handle_reader_and_writer(ecdysis: Ecdysis, reader: Any, writer: Any) -> None:
    """Serve a connection of asyncio's streams."""

    async def send(data: bytes) -> None:
        writer.write(data)
        await writer.drain()

    try:
        await converse(ecdysis, reader.readline, send)
    except ConnectionError:
        pass  # the client has left without waiting for its answer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


# The service


async def main() -> None:
    """Be one generation."""
    options = SETTINGS["ecdysis"]
    async with Ecdysis(**options) as ecdysis:
        NAMESPACE["ecdysis"] = ecdysis
        tell("entered", generation=ecdysis.generation)
        listeners = [
            getattr(ecdysis, method)(*arguments, **named) for method, arguments, named in SETTINGS["listeners"]
        ]
        await run_code(SETTINGS["at_start"], ecdysis=ecdysis, listeners=listeners)
        if SETTINGS["loop"] in ("anyio", "trio"):
            async with anyio.create_task_group() as task_group:
                handle = functools.partial(handle_stream, ecdysis)
                task_group.start_soon(functools.partial(ecdysis.serve, handle, *listeners))
                await be_ready(ecdysis, listeners)
        else:
            for listener in listeners:
                await ecdysis.start_server(functools.partial(handle_reader_and_writer, ecdysis), sock=listener)
            await be_ready(ecdysis, listeners)
    tell("left")


async def be_ready(ecdysis: Ecdysis, listeners: list[socket.socket]) -> None:
    """Serve until it is time to leave."""
    await ecdysis.ready()
    tell("ready", generation=ecdysis.generation, addresses=[listener.getsockname() for listener in listeners])
    await ecdysis.finished()
    tell("finished", generation=ecdysis.generation)


if __name__ == "__main__":
    tell("started", parent=os.getppid())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for constant, seconds in SETTINGS["limits"].items():
        setattr(next(each for each in (handover, successor_process) if hasattr(each, constant)), constant, seconds)
    exec(SETTINGS["at_import"], NAMESPACE)
    watch_handoff()
    watch_accepts()
    if SETTINGS["loop"] in ("anyio", "trio"):
        anyio.run(main, backend="asyncio" if SETTINGS["loop"] == "anyio" else "trio")
    else:
        ecdysis_async.run(main, loop=SETTINGS["loop"])
