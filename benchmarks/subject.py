"""The service that the benchmarks measure: it sends back what it gets, with an ``Ecdysis`` or without one.

With and without it are the same program with the same imports and the same handlers. What happens to it is told on
stdout, one line of JSON each, with the moment on the clock that all processes share (CLOCK_MONOTONIC). It measures
nothing but the lateness of its own loop, and that only if it is asked to.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import importlib
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

import ecdysis_async
from ecdysis_async import Ecdysis, until_draining

if TYPE_CHECKING:
    import asyncio

    import trio

HOST = "127.0.0.1"
LOOPS = ("asyncio", "uvloop", "trio")
MEGABYTE = 1024 * 1024

# How often the loop is asked whether it is in time, seconds: the shortest timer that uvloop knows.
BEAT_SECONDS = 0.001


class Style(enum.StrEnum):
    """What the service is written with."""

    STREAMS = "streams"
    SAFE_STREAMS = "safe-streams"  # streams, read in `until_draining`
    PROTOCOL = "protocol"
    ANYIO = "anyio"
    SAFE_ANYIO = "safe-anyio"
    TRIO = "trio"
    SAFE_TRIO = "safe-trio"


async def echo_streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send each line back."""
    while line := await reader.readline():
        writer.write(line)
        await writer.drain()
    writer.close()


async def echo_safe_streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send each line back, and wait for the next one at a safe point."""
    while line := await until_draining(reader.readline()):
        writer.write(line)
        await writer.drain()
    writer.close()


async def echo_anyio(stream: anyio.abc.SocketStream) -> None:
    """Send back what comes."""
    async with stream:
        async for data in stream:
            await stream.send(data)


async def echo_safe_anyio(stream: anyio.abc.SocketStream) -> None:
    """Send back what comes, and wait for it at a safe point."""
    async with stream:
        with contextlib.suppress(anyio.EndOfStream):
            while True:
                await stream.send(await until_draining(stream.receive()))


async def echo_trio(stream: trio.SocketStream) -> None:
    """Send back what comes."""
    async with stream:
        async for data in stream:
            await stream.send_all(data)


async def echo_safe_trio(stream: trio.SocketStream) -> None:
    """Send back what comes, and wait for it at a safe point."""
    async with stream:
        while data := await until_draining(stream.receive_some()):
            await stream.send_all(data)


def make_protocol() -> type[asyncio.Protocol]:
    """Return a protocol that sends back what comes."""
    import asyncio

    class Echo(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(data)

    return Echo


async def serve_bare(style: Style, port: int) -> None:
    """Serve by what asyncio, anyio and trio have themselves, until killed."""
    match style:
        case Style.ANYIO | Style.SAFE_ANYIO:
            listener = await anyio.create_tcp_listener(local_host=HOST, local_port=port)
            tell("serving", port=listener.extra(anyio.abc.SocketAttribute.local_port), generation=1)
            await listener.serve(echo_anyio)
        case Style.TRIO | Style.SAFE_TRIO:
            import trio

            listeners = await trio.open_tcp_listeners(port, host=HOST)
            tell("serving", port=listeners[0].socket.getsockname()[1], generation=1)
            await trio.serve_listeners(echo_trio, listeners)
        case _:
            import asyncio

            if style is Style.PROTOCOL:
                server = await asyncio.get_running_loop().create_server(make_protocol(), HOST, port)
            else:
                server = await asyncio.start_server(echo_streams, HOST, port)
            tell("serving", port=server.sockets[0].getsockname()[1], generation=1)
            await server.serve_forever()


async def serve_restartable(style: Style, port: int, probation: float, resident: int, *, beats: bool) -> None:
    """Serve by an ``Ecdysis``, from its start to the end of its drain."""
    async with measured_beats(wanted=beats) as lateness, Ecdysis(probation=probation) as ecdysis:
        # In the first generation only, which is the one that is measured: how a successor fills its memory is its own
        # affair, and the same however it was started.
        memory = occupy(resident * MEGABYTE) if ecdysis.generation == 1 and resident else None
        async with anyio.create_task_group() as task_group:
            sock = ecdysis.listen_tcp(HOST, port)
            match style:
                case Style.ANYIO | Style.SAFE_ANYIO:
                    echo = echo_anyio if style is Style.ANYIO else echo_safe_anyio
                    task_group.start_soon(ecdysis.serve, echo, sock)
                case Style.TRIO | Style.SAFE_TRIO:
                    from ecdysis_async.trio_listeners import TrioListener

                    serve_trio = echo_trio if style is Style.TRIO else echo_safe_trio
                    task_group.start_soon(ecdysis.serve, serve_trio, TrioListener(sock))
                case Style.PROTOCOL:
                    await ecdysis.create_server(make_protocol(), sock=sock)
                case _:
                    handler = echo_safe_streams if style is Style.SAFE_STREAMS else echo_streams
                    await ecdysis.start_server(handler, sock=sock)
            await ecdysis.ready()
            tell("serving", port=sock.getsockname()[1], generation=ecdysis.generation)
            await ecdysis.finished()
            tell("draining", generation=ecdysis.generation)
    if memory is not None:
        memory.close()
    report = ecdysis.last_report
    tell("left", generation=ecdysis.generation, report=report.to_json() if report is not None else None, beats=lateness)


@contextlib.asynccontextmanager
async def measured_beats(*, wanted: bool) -> AsyncIterator[list[tuple[float, float, float]]]:
    """Note, until the block ends, when the loop had its turn, how late, and what of that it waited for a processor.

    All of that in seconds; the last is what the scheduler says, and other processes are to blame for it.
    """
    beats: list[tuple[float, float, float]] = []

    async def beat(statistics: int) -> None:
        before, waited_before = time.monotonic(), read_waited(statistics)
        while True:
            await anyio.sleep(BEAT_SECONDS)
            now, waited = time.monotonic(), read_waited(statistics)
            beats.append((now, now - before - BEAT_SECONDS, waited - waited_before))
            before, waited_before = now, waited

    with open("/proc/thread-self/schedstat", "rb") as statistics:  # noqa: ASYNC230 - in memory
        async with anyio.create_task_group() as task_group:
            if wanted:
                task_group.start_soon(beat, statistics.fileno())
            yield beats
            task_group.cancel_scope.cancel()


def read_waited(statistics: int) -> float:
    """Return how long this thread has waited for a processor so far, in seconds."""
    # Three numbers: time on the processor, time on a run queue, time slices (Documentation/scheduler/sched-stats.rst).
    return int(os.pread(statistics, 100, 0).split()[1]) / 1e9


def occupy(size: int) -> mmap.mmap:
    """Take memory, in bytes, and touch each page of it."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A heap of many small objects has small pages, and fork copies an entry for each one.
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for offset in range(0, size, mmap.PAGESIZE):
        memory[offset] = 1
    return memory


def settle_allocator() -> None:
    """Let malloc take what asyncio reads into, 256 KiB each time, from its heap, in every subject."""
    # mallopt(3): up to 128 KiB at first, and dynamically up to what was mapped and freed before. Without this it is a
    # matter of luck, which a program's imports decide, whether each read costs an mmap and a munmap, twice the time.
    bytearray(4 * MEGABYTE)


def tell(event: str, **facts: Any) -> None:
    """Write a line for whoever runs the benchmark, in one piece: several generations write into the same pipe."""
    sys.stdout.write(json.dumps({"event": event, "at": time.monotonic(), "pid": os.getpid(), **facts}) + "\n")
    sys.stdout.flush()


def run_on(loop: str, main: Callable[[], Coroutine[Any, Any, None]], *, bare: bool) -> None:
    """Run on a loop; the modules that an ``Ecdysis`` needs there are imported with and without one."""
    for module in ("anyio_listeners", "trio_listeners") if loop == "trio" else ("anyio_listeners", "_accepting.loops"):
        importlib.import_module(f"ecdysis_async.{module}")
    if loop == "trio":
        anyio.run(main, backend="trio")
    elif bare:
        import asyncio

        factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.SelectorEventLoop
        if loop == "uvloop":
            import uvloop

            factory = uvloop.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main())
    else:
        ecdysis_async.run(main, loop="uvloop" if loop == "uvloop" else "asyncio")


def main() -> None:
    """Read the command line, which all generations share, and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", choices=LOOPS, default="asyncio")
    parser.add_argument("--style", type=Style, choices=list(Style), default=Style.STREAMS)
    parser.add_argument("--port", type=int, default=0, help="by default, one that is free")
    parser.add_argument("--bare", action="store_true", help="without an Ecdysis")
    parser.add_argument("--probation", type=float, default=0.05, help="seconds")
    parser.add_argument("--resident", type=int, default=0, help="megabytes of memory of the first generation")
    parser.add_argument("--beats", action="store_true", help="tell how late the loop was, all the time")
    parser.add_argument("--fork", action="store_true", help="start successors by fork and exec, not by vfork and exec")
    options = parser.parse_args()
    if options.fork:
        # The switch that the documentation of subprocess names for it.
        subprocess._USE_VFORK = False  # type: ignore[misc]  # noqa: SLF001
    if options.bare:
        service = partial(serve_bare, options.style, options.port)
    else:
        given = (options.style, options.port, options.probation, options.resident)
        service = partial(serve_restartable, *given, beats=options.beats)
    settle_allocator()
    run_on(options.loop, service, bare=options.bare)


if __name__ == "__main__":
    main()
