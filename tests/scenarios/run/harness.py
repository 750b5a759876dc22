"""``ecdysis run`` as a real process: started and ended here, its log read, its clients counted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from tests.scenarios.servers.clients import read_head

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[2]
ECDYSIS = (sys.executable, "-W", "error", "-m", "ecdysis_async.cli")

PATIENCE_SECONDS = 60.0

# A command may wait for a service that starts several processes, on a machine that has other work.
COMMAND_SECONDS = 240.0

# So that a test does not wait for what it does not test.
QUICK = ("--probation", "0.1", "--drain-timeout", "5")

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Open = Callable[[], Coroutine[Any, Any, Streams]]


class Run:
    """A service that runs.

    Attributes:
        process: the one that was started.
        lines: its log.
    """

    def __init__(self, process: subprocess.Popen[bytes], control: str) -> None:
        self.process = process
        self.lines: list[str] = []
        self._control = control
        self._news = asyncio.Condition()

    async def listen(self, log: asyncio.StreamReader) -> None:
        """Take note of everything, to the end of the last process."""
        while line := await log.readline():
            async with self._news:
                self.lines.append(line.decode().rstrip())
                self._news.notify_all()
        async with self._news:
            self._news.notify_all()

    async def wait_for(self, pattern: str, number: int = 1) -> str:
        """Wait for a line of the log, or for the nth such; return what its first group holds, or all of it."""

        def find() -> list[re.Match[str]]:
            return [found for line in self.lines if (found := re.search(pattern, line))]

        try:
            async with asyncio.timeout(PATIENCE_SECONDS), self._news:
                await self._news.wait_for(lambda: len(find()) >= number)
        except TimeoutError:
            raise AssertionError(f"no line {number} with {pattern!r} in\n" + "\n".join(self.lines)) from None
        found = find()[number - 1]
        return found[1] if found.groups() else found[0]

    async def find_port(self) -> int:
        """Return where it listens, once it does."""
        return int(await self.wait_for(r"serving on .*?127\.0\.0\.1:(\d+)"))

    async def restart(self, *arguments: str) -> tuple[int, str]:
        """Run ``ecdysis restart``; return exit code and output."""
        return await asyncio.to_thread(run_command, "restart", "--control", self._control, *arguments)

    def signal(self, number: int) -> None:
        """Send a signal to the process that was started."""
        self.process.send_signal(number)


def run_command(*arguments: str, **environment: str) -> tuple[int, str]:
    """Run the command to its end; return exit code and output."""
    done = subprocess.run(
        [*ECDYSIS, *arguments],
        cwd=PROJECT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=COMMAND_SECONDS,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@contextlib.asynccontextmanager
async def running(
    directory: Path, *arguments: str, pass_fds: Sequence[int] = (), **environment: str
) -> AsyncIterator[Run]:
    """Run ``ecdysis run`` in a directory; stop it by SIGTERM, and see that it ends well."""
    control = str(directory / "control")
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as pipe:
        process = subprocess.Popen(
            [*ECDYSIS, "run", *QUICK, "--control", control, *arguments],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(PROJECT), **environment},
            stdout=pipe,
            stderr=pipe,
            pass_fds=pass_fds,
        )
    log = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(log), os.fdopen(reader, "rb")
    )
    run = Run(process, control)
    listening = asyncio.create_task(run.listen(log))
    try:
        yield run
        run.signal(signal.SIGTERM)
        await asyncio.wait_for(asyncio.shield(listening), PATIENCE_SECONDS)
        assert await asyncio.to_thread(process.wait) == 0, "\n".join(run.lines)
    except BaseException:
        print("\n".join(run.lines))  # noqa: T201 - what pytest shows of a failed test
        raise
    finally:
        if process.poll() is None:
            # An orderly end takes its workers with it; a second signal hurries, and the third is no question.
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
                process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(process.wait, 10)
        transport.close()
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


def by_tcp(port: int, context: ssl.SSLContext | None = None) -> Open:
    """Return what connects to a port."""

    async def open_tcp() -> Streams:
        name = "localhost" if context is not None else None
        return await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)

    return open_tcp


def by_path(path: Path) -> Open:
    """Return what connects to a Unix socket."""

    async def open_unix() -> Streams:
        return await asyncio.open_unix_connection(str(path))

    return open_unix


async def get(open_streams: Open, path: str = "/", **headers: str) -> str:
    """Make one request on a connection of its own; return the body."""
    streams = await open_streams()
    try:
        return (await ask(streams, path, Connection="close", **headers))[0]
    finally:
        streams[1].close()


async def ask(streams: Streams, path: str = "/", **headers: str) -> tuple[str, bool]:
    """Make one request; return the body, and whether the connection is good for another one."""
    reader, writer = streams
    lines = [f"GET {path} HTTP/1.1", "Host: localhost", *(f"{name}: {value}" for name, value in headers.items())]
    writer.write("\r\n".join([*lines, "", ""]).replace("_", "-").encode())
    answer = await read_head(reader)
    body = await reader.readexactly(int(answer["content-length"]))
    return body.decode(), answer.get("connection", "").lower() != "close"


@contextlib.asynccontextmanager
async def loading(visit: Callable[[], Coroutine[Any, Any, None]], clients: int = 3) -> AsyncIterator[None]:
    """Let clients visit again and again meanwhile; see that each visit goes well, and that there are some."""
    failures: list[str] = []
    visits = 0
    ended = asyncio.Event()

    async def repeat() -> None:
        nonlocal visits
        while not ended.is_set():
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await visit()
                visits += 1
            except (OSError, EOFError, AssertionError) as error:
                failures.append(repr(error))

    async with asyncio.TaskGroup() as task_group:
        for _ in range(clients):
            task_group.create_task(repeat())
        try:
            yield
        finally:
            ended.set()
    assert failures == []
    assert visits > clients


def visiting_http(open_streams: Open) -> Callable[[], Coroutine[Any, Any, None]]:
    """Return a visit of several requests on one connection, as long as it is kept alive."""

    async def visit() -> None:
        streams = await open_streams()
        try:
            for _ in range(20):
                body, is_kept = await ask(streams)
                assert body == "ok", body
                if not is_kept:
                    return
                await asyncio.sleep(0.01)
        finally:
            streams[1].close()

    return visit


def visiting_echo(open_streams: Open) -> Callable[[], Coroutine[Any, Any, None]]:
    """Return a visit that has one line echoed."""

    async def visit() -> None:
        reader, writer = await open_streams()
        try:
            writer.write(b"hello\n")
            assert await reader.readline() == b"hello\n"
            await asyncio.sleep(0.01)
        finally:
            writer.close()

    return visit
