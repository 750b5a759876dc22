"""The service under proof, from outside: started, looked at, restarted, hit, and stopped.

There are two kinds: one that has a control socket, and one that is known by its commands only.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ecdysis_async._management.control_path import locate

from .plan import Plan, PlanError, Step, Url
from .processes import find_acceptors, find_family
from .records import Restart
from .settings import APP_DIR_VARIABLE, BROKEN_VARIABLE, FACTORY_VARIABLE, PLAIN_VARIABLE, TARGET_VARIABLE

__all__ = [
    "CommandedService",
    "ControlledService",
    "OwnService",
    "Service",
    "ServiceFailed",
    "choose_service",
    "find_url",
    "find_value",
]

COMMAND = (sys.executable, "-m", "ecdysis_async.cli")

# What is not said to a service of the proof's own: it shall not take minutes.
DEFAULTS = {"--bind": "127.0.0.1:0", "--probation": "1", "--drain-timeout": "10", "--log-level": "info"}
ALIASES = {"--bind": ("-b",), "--drain-timeout": ("--graceful-timeout",)}

WRAPPER = "ecdysis_async._proving.wrapper:release"

POLL_SECONDS = 0.02
SILENCE_SECONDS = 30.0
STOP_SECONDS = 30.0

# How long processes of a service that is not restarted by this library may take to be others.
CHANGE_SECONDS = 30.0

TAIL_LINES = 15

LOOPBACK = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "": "127.0.0.1"}  # noqa: S104 - what is asked instead of all

Status = dict[str, Any]


class ServiceFailed(Exception):
    """The service cannot be proved: it does not start, or is not there."""


class Service(abc.ABC):
    """A service.

    Attributes:
        url: where it listens, once it has started.
    """

    url: Url

    @abc.abstractmethod
    async def start(self) -> None:
        """Start it, if that is to be done, and wait until it serves.

        Raises:
            ServiceFailed: it does not.
        """

    @abc.abstractmethod
    async def stop(self) -> None:
        """Stop what was started."""

    @abc.abstractmethod
    async def look(self) -> dict[int, tuple[int | None, str | None]]:
        """Return the generation and the state of each of its processes that serve clients, as far as they are known."""

    @abc.abstractmethod
    async def find_processes(self) -> set[int]:
        """Return all its processes."""

    async def _wait_until_gone(self, former: frozenset[int]) -> None:
        """Wait until none of these processes serves any client."""
        while former & (await self.look()).keys():  # noqa: ASYNC110 - another process tells nobody
            await asyncio.sleep(5 * POLL_SECONDS)

    @abc.abstractmethod
    async def carry_out(self, restart: Restart, clock: Callable[[], float]) -> None:
        """Do one step, and note what became of it."""


class ControlledService(Service):
    """One that has a control socket, and runs already.

    Args:
        control: the path of its control socket.
        url: where it listens; None: as it says.
        timeout: how long a restart may take, in seconds.
    """

    def __init__(self, control: str, url: Url | None, timeout: float) -> None:
        self._control = control
        self._given = url
        self._timeout = timeout

    async def start(self) -> None:
        status = await self.ask()
        self.url = self._given or find_url(status, "http", "/")

    async def stop(self) -> None:
        """Leave it as it is."""

    async def ask(self) -> Status:
        """Return its status.

        Raises:
            ServiceFailed: it does not answer.
        """
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                reader, writer = await asyncio.open_unix_connection(self._control, limit=2**24)
                try:
                    writer.write(b'{"command": "status"}\n')
                    answer: Status = json.loads(await reader.readline())
                finally:
                    writer.close()
        except (OSError, ValueError) as error:
            raise ServiceFailed(f"no service answers at its control socket {self._control}: {error}") from error
        if "status" not in answer:
            raise ServiceFailed(f"the service at {self._control} says {answer.get('message', answer)}")
        status: Status = answer["status"]
        return status

    async def look(self) -> dict[int, tuple[int | None, str | None]]:
        status = await self.ask()
        if "workers" in status:
            seen = {each["pid"]: (each["generation"], each["state"]) for each in status["workers"]}
        else:
            seen = {status["pid"]: (status["generation"], status["state"])}
            if (restart := status["restart"]) is not None and restart["pid"] is not None:
                seen.setdefault(restart["pid"], (restart["generation"], "starting"))
        for each in status["draining"]:
            seen.setdefault(each["pid"], (each["generation"], "draining"))
        return seen

    async def find_processes(self) -> set[int]:
        status = await self.ask()
        return await asyncio.to_thread(find_family, {status["pid"], *await self.look()})

    async def carry_out(self, restart: Restart, clock: Callable[[], float]) -> None:
        before = await self.look()
        restart.former = frozenset(before)
        command = await asyncio.create_subprocess_exec(
            *COMMAND, "restart", "--json", "--control", self._control,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            async with asyncio.timeout(self._timeout):
                if restart.step in (Step.SUCCESSOR_KILLED, Step.PREDECESSOR_KILLED):
                    await self._kill(restart, command, clock)
                output, errors = await command.communicate()
        except TimeoutError:
            restart.message = f"it was not over within {self._timeout:g} seconds"
            return
        finally:
            restart.answered = clock()
            if command.returncode is None:
                command.kill()
                await command.wait()
        restart.code = command.returncode
        event = _read_last(output)
        restart.report, restart.message = event.get("report"), event.get("message") or errors.decode() or None
        if restart.code == 0:
            restart.generation = (restart.report or {}).get("generation")
            await self._wait_for_drain(restart, clock)

    async def _kill(self, restart: Restart, command: asyncio.subprocess.Process, clock: Callable[[], float]) -> None:
        """Kill one of the two sides as soon as there are two; nobody serves in the new one yet."""
        while command.returncode is None:
            workers: list[Status] = []
            with contextlib.suppress(ServiceFailed):  # the outcome of the restart tells
                workers = (await self.ask()).get("workers", [])
            for successor in workers:
                if successor["pid"] in restart.former:
                    continue
                former = (each["pid"] for each in workers if each["slot"] == successor["slot"])
                predecessor = next((pid for pid in former if pid in restart.former), None)
                victim = successor["pid"] if restart.step is Step.SUCCESSOR_KILLED else predecessor
                if victim is not None:
                    restart.killed, restart.killed_at = victim, clock()
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(victim, signal.SIGKILL)
                return
            await asyncio.sleep(POLL_SECONDS)

    async def _wait_for_drain(self, restart: Restart, clock: Callable[[], float]) -> None:
        with contextlib.suppress(TimeoutError, ServiceFailed):
            async with asyncio.timeout(self._timeout):
                await self._wait_until_gone(restart.former)
        restart.ended = clock()


class OwnService(ControlledService):
    """One that the proof starts by ``ecdysis run``, and stops.

    Args:
        plan: what is started.
        directory: of the proof's own.
    """

    def __init__(self, plan: Plan, directory: Path) -> None:
        super().__init__(str(directory / "control"), None, plan.restart_timeout)
        assert plan.target is not None
        self._target = plan.target
        self._options = list(plan.run_options)
        self._path = plan.requests[0].path
        self._log = Path(plan.log) if plan.log is not None else directory / "log"
        self._broken = directory / "broken"
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        environment = {
            **os.environ,
            TARGET_VARIABLE: self._target,
            BROKEN_VARIABLE: str(self._broken),
            APP_DIR_VARIABLE: find_value(self._options, "--app-dir") or os.environ.get("ECDYSIS_APP_DIR", "."),
        }
        options = list(self._options)
        if "--factory" in options:
            options.remove("--factory")
            environment[FACTORY_VARIABLE] = "1"
        if find_value(options, "--server") == "websockets":
            environment[PLAIN_VARIABLE] = "1"
        if find_value(options, "--config") is None:
            for name, value in DEFAULTS.items():
                if all(find_value(options, each) is None for each in (name, *ALIASES.get(name, ()))):
                    options += [name, value]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs here yet
                [*COMMAND, "run", WRAPPER, "--factory", *options, "--control", self._control],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        scheme = "https" if find_value(options, "--certfile") or find_value(options, "--ssl-certfile") else "http"
        async with asyncio.timeout(self._timeout):
            while True:
                if self._process.poll() is not None:
                    raise ServiceFailed(
                        f"the service does not start: `ecdysis run {shlex.join([self._target, *self._options])}` "
                        f"has ended with status {self._process.returncode}\n{_tail(self._log)}"
                    )
                with contextlib.suppress(ServiceFailed):
                    status = await self.ask()
                    if status["state"] == "serving":
                        break
                await asyncio.sleep(POLL_SECONDS)
        self.url = find_url(status, scheme, self._path)

    async def stop(self) -> None:
        if self._process is None:
            return
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                self._process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, STOP_SECONDS)
                return

    async def carry_out(self, restart: Restart, clock: Callable[[], float]) -> None:
        if restart.step is Step.BROKEN:
            self._broken.touch()
        try:
            await super().carry_out(restart, clock)
        finally:
            self._broken.unlink(missing_ok=True)


class CommandedService(Service):
    """One of any kind, which commands start and restart.

    Args:
        plan: has the commands.
        directory: of the proof's own.
    """

    def __init__(self, plan: Plan, directory: Path) -> None:
        assert plan.url is not None
        self.url = plan.url
        self._command = plan.command
        self._restart = plan.restart_command
        self._timeout = plan.restart_timeout
        self._log = Path(plan.log) if plan.log is not None else directory / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._workers: set[int] = set()

    async def start(self) -> None:
        if shutil.which(self._restart[0]) is None:
            raise ServiceFailed(f"--restart-command {self._restart[0]}: there is no such program")
        if not self._command:
            await self._connect()
            return
        if await self._is_listening():
            raise PlanError(f"something listens at {self.url} already: stop it, or choose another port for --command")
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs here yet
                    self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
        except OSError as error:
            raise ServiceFailed(f"--command {self._command[0]}: {error.strerror}") from None
        deadline = asyncio.get_running_loop().time() + self._timeout
        while not await self._is_listening():
            if self._process.poll() is not None:
                raise ServiceFailed(
                    f"--command has ended with status {self._process.returncode}, and nothing listens at {self.url}\n"
                    f"{_tail(self._log)}"
                )
            if asyncio.get_running_loop().time() > deadline:
                raise ServiceFailed(f"nothing listens at {self.url} after {self._timeout:g} seconds: is --url right?")
            await asyncio.sleep(5 * POLL_SECONDS)

    async def stop(self) -> None:
        if self._process is None:
            return
        family = await asyncio.to_thread(find_family, {self._process.pid})
        self._process.terminate()
        try:
            await asyncio.to_thread(self._process.wait, STOP_SECONDS)
        except subprocess.TimeoutExpired:
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.to_thread(self._process.wait)

    async def look(self) -> dict[int, tuple[int | None, str | None]]:
        family = await self.find_processes()
        # A process that leaves closes its listening socket first, and still serves clients.
        self._workers = (self._workers & family) | await asyncio.to_thread(find_acceptors, family, self.url.port)
        # Where there are several, the first process is in front of the others, and stays.
        front = {self._process.pid} if self._process is not None and len(self._workers) > 1 else set()
        return dict.fromkeys(self._workers - front, (None, None))

    async def find_processes(self) -> set[int]:
        return await asyncio.to_thread(find_family, {self._process.pid}) if self._process is not None else set()

    async def carry_out(self, restart: Restart, clock: Callable[[], float]) -> None:
        restart.former = frozenset(await self.look())
        words = [word.replace("{pid}", str(self._process.pid) if self._process else "") for word in self._restart]
        command = await asyncio.create_subprocess_exec(
            *words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            async with asyncio.timeout(self._timeout):
                _, errors = await command.communicate()
        except TimeoutError:
            restart.message = f"--restart-command was not over within {self._timeout:g} seconds"
            command.kill()
            await command.wait()
            return
        restart.code, restart.message = command.returncode, errors.decode(errors="replace").strip() or None
        # The command only asks for it: what was asked for is done once all processes that served are others.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CHANGE_SECONDS if restart.former and restart.code == 0 else 0):
                await self._wait_until_gone(restart.former)
        restart.answered = restart.ended = clock()

    async def _is_listening(self) -> bool:
        try:
            await self._connect()
        except ServiceFailed:
            return False
        return True

    async def _connect(self) -> None:
        try:
            _, writer = await asyncio.open_connection(self.url.host, self.url.port)
        except OSError as error:
            raise ServiceFailed(f"nothing listens at {self.url}: {error}") from None
        writer.close()
        # A reset is as good as an end.
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@contextlib.contextmanager
def choose_service(plan: Plan) -> Iterator[Service]:
    """Return the service of a plan, and a directory for it as long as it is needed.

    Raises:
        PlanError: none, or several, are meant.
    """
    with tempfile.TemporaryDirectory(prefix="ecdysis-prove-") as directory:
        if plan.target is not None:
            yield OwnService(plan, Path(directory))
        elif plan.restart_command:
            yield CommandedService(plan, Path(directory))
        else:
            yield ControlledService(_find_control(plan.control), plan.url, plan.restart_timeout)


def _find_control(control: str | None) -> str:
    try:
        return locate(control or "")
    except ValueError as error:
        raise PlanError(f"--control: {error}") from None


def find_url(status: Status, scheme: str, path: str) -> Url:
    """Return where a service says that it listens on TCP, by an address of loopback.

    Raises:
        ServiceFailed: nowhere.
    """
    for listener in status["listeners"]:
        if listener["kind"] == "tcp":
            host, _, port = listener["address"].rpartition(":")
            return Url(scheme, LOOPBACK.get(host, host).strip("[]"), int(port), path)
    raise ServiceFailed("the service listens on no TCP address: say by --bind 127.0.0.1:0, or where by --url")


def find_value(options: Sequence[str], name: str) -> str | None:
    """Return the value of an option of ``ecdysis run``, as it may be written."""
    for index, word in enumerate(options):
        if word == name:
            return options[index + 1] if index + 1 < len(options) else ""
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _read_last(output: bytes) -> dict[str, Any]:
    try:
        event: dict[str, Any] = json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        return {}
    return event


def _tail(log: Path) -> str:
    return "\n".join(f"  | {line}" for line in log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
