"""The datagrams of sd_notify and the variables of an activation, byte for byte; the rest is shown on a real systemd."""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import psutil
import pytest

from ecdysis_async import Ecdysis, RestartUnsupported, SpawnFailed, State
from ecdysis_async._ipc.peer import wait_for_death
from ecdysis_async._management.systemd import Systemd, find_systemd
from ecdysis_async._sockets.addresses import Internet, Unix
from ecdysis_async._sockets.registry import Registry
from ecdysis_async._system.launch import Launch
from ecdysis_async._system.process import Process, spawn
from tests.management.managers import Manager
from tests.scenarios.handoff.harness import set_subreaper

PROJECT = Path(__file__).resolve().parents[2]


async def test_only_the_main_process_speaks(manager: Manager) -> None:
    systemd = Systemd(manager.address)
    with anyio.fail_after(60):
        systemd.tell("lost")
        systemd.begin()
        systemd.tell("READY=1", "STATUS=generation 1")
        await systemd.flush()
        assert await manager.hear() == ["READY=1", "STATUS=generation 1"]
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(systemd.name_main, 4711, "READY=1")
            assert await manager.hear() == ["MAINPID=4711", "READY=1"]
            assert await manager.hear() == ["BARRIER=1"]
            assert not systemd.is_main
            manager.lift()
        systemd.begin()
        systemd.tell("lost")
        await systemd.flush()
    with pytest.raises(BlockingIOError):
        manager.sock.recv(1)


async def test_reloading_has_its_time_in_the_same_datagram(manager: Manager) -> None:
    systemd = Systemd(manager.address)
    systemd.begin()
    before = time.monotonic()
    systemd.tell_reloading(1.5)
    await systemd.flush()
    reloading, since, extension = await manager.hear()
    assert (reloading, extension) == ("RELOADING=1", "EXTEND_TIMEOUT_USEC=1500000")
    key, _, microseconds = since.partition("=")
    assert key == "MONOTONIC_USEC"
    assert int(before * 1e6) <= int(microseconds) <= time.monotonic() * 1e6


async def test_a_status_is_one_line_and_said_once(manager: Manager) -> None:
    systemd = Systemd(manager.address)
    systemd.begin()
    for text in ("it failed:\n  Type=evil", "it failed:\n  Type=evil", "it serves"):
        systemd.tell_status(text)
    await systemd.flush()
    assert [await manager.hear() for _ in range(2)] == [["STATUS=it failed: Type=evil"], ["STATUS=it serves"]]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EADDRINUSE, "address in use"), [f"ERRNO={errno.EADDRINUSE}", "EXIT_STATUS=1"]),
        (SystemExit(7), ["EXIT_STATUS=7"]),
        (SystemExit("a text"), ["EXIT_STATUS=1"]),
    ],
)
async def test_a_failure_is_told_with_its_numbers(manager: Manager, error: BaseException, said: list[str]) -> None:
    systemd = Systemd(manager.address)
    systemd.begin()
    systemd.tell_failure(error)
    await systemd.flush()
    assert await manager.hear() == said


async def test_a_service_that_fails_tells_its_manager(manager: Manager, environment: Callable[..., None]) -> None:
    environment(NOTIFY_SOCKET=manager.address)
    heard: list[str] = []

    async def listen() -> None:
        while True:
            heard.extend(await manager.hear())
            manager.lift()

    async def serve() -> None:
        async with Ecdysis(restart_signals=(), stop_signals=()) as ecdysis:
            await ecdysis.ready()
            raise OSError(errno.EIO, "broken")

    async with anyio.create_task_group() as task_group:
        task_group.start_soon(listen)
        with pytest.raises(OSError, match="broken"):
            await serve()
        task_group.cancel_scope.cancel()
    assert {"READY=1", f"ERRNO={errno.EIO}", "EXIT_STATUS=1"} <= set(heard)


async def test_messages_wait_for_room_in_their_order(manager: Manager) -> None:
    systemd = Systemd(manager.address)
    systemd.begin()
    numbers = [f"X_NUMBER={number}" for number in range(2000)]
    for number in numbers:
        systemd.tell(number)
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(systemd.run)
        with anyio.fail_after(60):
            assert [(await manager.hear())[0] for _ in numbers] == numbers
        task_group.cancel_scope.cancel()


async def test_the_watchdog_is_petted_twice_in_its_time_by_the_main_process_only(manager: Manager) -> None:
    systemd = Systemd(manager.address, watchdog=0.02)
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(systemd.run)
        with anyio.move_on_after(0.05):
            await manager.hear()
            raise AssertionError("it spoke before it was the main process")
        systemd.begin()
        with anyio.fail_after(60):
            assert [await manager.hear() for _ in range(4)] == [["WATCHDOG=1"]] * 4
        task_group.cancel_scope.cancel()


async def test_a_deaf_systemd_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    systemd = Systemd(str(tmp_path / "nobody"))
    systemd.begin()
    with caplog.at_level(logging.WARNING), anyio.fail_after(60):
        for _ in range(2):
            systemd.tell("READY=1")
            await systemd.flush()
        await systemd.synchronize()
    assert [record.message[:35] for record in caplog.records] == ["systemd does not hear this service "]


# A service with one socket, and with no descriptor left but for the time in which it parks the socket.
EXHAUSTED = """
import contextlib, os, resource, sys
import anyio
from ecdysis_async._management.descriptor_store import DescriptorStore
from ecdysis_async._management.systemd import Systemd
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async._sockets.registry import Registry

kept = []

def use_up():
    with contextlib.suppress(OSError):
        while True:
            kept.append(os.open(os.devnull, os.O_RDONLY))

async def main():
    registry, systemd = Registry(), Systemd(sys.argv[1])
    registry.obtain(Internet("127.0.0.1", 0))
    registry.start_listening()
    store = DescriptorStore(systemd, "16")
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(systemd.run)
        await anyio.wait_all_tasks_blocked()
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        use_up()
        systemd.begin()
        store.park(registry.entries)
        systemd.tell("READY=1")
        await systemd.flush()
        os.close(kept.pop())
        store.park(registry.entries)
        await systemd.name_main(4711)
        task_group.cancel_scope.cancel()

anyio.run(main)
"""


@pytest.mark.main_python_only
@pytest.mark.backends("asyncio")
async def test_systemd_is_told_where_no_descriptor_is_left(manager: Manager) -> None:
    """A restart is the remedy, and its successor has to become the main process. What can be parked later is."""
    program = [sys.executable, "-c", EXHAUSTED, manager.address]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as process, anyio.fail_after(60):
        heard = await manager.hear_until("BARRIER")
        manager.lift()
        _, written = await anyio.to_thread.run_sync(process.communicate)
        assert process.returncode == 0
    (name,) = [line for line in heard if line.startswith("FDNAME=")]
    assert heard == ["READY=1", "FDSTORE=1", "FDPOLL=0", name, "MAINPID=4711", "BARRIER=1"]
    assert "cannot keep tcp:127.0.0.1:" in written
    assert "Too many open files: raise the limit (ulimit -n, LimitNOFILE=)" in written


def test_it_is_switched_on_by_the_notification_socket(environment: Callable[..., None]) -> None:
    assert not find_systemd(None).is_there
    with pytest.raises(ValueError, match="Type=notify"):
        find_systemd(wanted=True)
    environment(NOTIFY_SOCKET="@some/where")
    assert find_systemd(None).is_there
    assert find_systemd(wanted=True).is_there
    assert not find_systemd(wanted=False).is_there
    environment(NOTIFY_SOCKET="vsock:2:1")
    with pytest.raises(ValueError, match="systemd=False"):
        find_systemd(None)


@pytest.mark.parametrize(
    ("pid", "usec", "seconds"),
    [
        ("own", "3000000", 3.0),
        (None, "500000", 0.5),
        ("1", "500000", None),
        (None, "x", None),
        (None, "0", None),
        (None, "9" * 5000, None),
    ],
)
def test_the_watchdog_holds_for_this_process(
    environment: Callable[..., None], pid: str | None, usec: str, seconds: float | None
) -> None:
    environment(NOTIFY_SOCKET="@x", WATCHDOG_USEC=usec)
    if pid is not None:
        environment(WATCHDOG_PID=str(os.getpid()) if pid == "own" else pid)
    assert find_systemd(None).watchdog == seconds


async def test_a_restart_that_would_end_the_unit_is_refused(backend: str, environment: Callable[..., None]) -> None:
    environment(SYSTEMD_EXEC_PID=str(os.getpid()))
    async with Ecdysis(restart_signals=(), stop_signals=()) as ecdysis:
        await ecdysis.ready()
        with pytest.raises(RestartUnsupported, match="Type=notify"):
            await ecdysis.restart()
        assert ecdysis.state is State.SERVING
    # Whoever says that there is no systemd to be asked is taken at their word.
    async with Ecdysis(restart_signals=(), stop_signals=(), systemd=False, command=["/does/not/exist"]) as ecdysis:
        await ecdysis.ready()
        with pytest.raises(SpawnFailed):
            await ecdysis.restart()


def make_listener(family: int = socket.AF_INET, address: object = ("127.0.0.1", 0)) -> socket.socket:
    sock = socket.socket(family)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(address)  # type: ignore[arg-type]
    sock.listen()
    return sock


def activate(*named: tuple[str, socket.socket]) -> tuple[Registry, list[int]]:
    registry = Registry()
    numbers = [sock.detach() for _, sock in named]
    registry.activate({number: name for number, (name, _) in zip(numbers, named, strict=True)})
    return registry, numbers


def test_an_activated_socket_is_claimed_by_its_address() -> None:
    first, second = make_listener(), make_listener()
    port = second.getsockname()[1]
    registry, (_, number) = activate(("web.socket", first), ("web.socket", second))
    entry = registry.obtain(Internet("127.0.0.1", port))
    assert (entry.sock.fileno(), entry.number, entry.claimed) == (number, number, True)
    assert len(registry.unclaimed()) == 1
    registry.close(unlink=True)


def test_an_activated_socket_is_claimed_by_its_name_whatever_the_address() -> None:
    registry, (number, _) = activate(("web", make_listener()), ("web", make_listener()))
    assert registry.obtain(Internet("0.0.0.0", 80), name="web").number == number
    with pytest.raises(LookupError, match="admin"):
        registry.claim("admin")
    registry.close(unlink=True)


def test_repeated_names_are_claimed_in_their_order_and_the_right_address_first() -> None:
    sockets = [make_listener() for _ in range(3)]
    port = sockets[1].getsockname()[1]
    registry, numbers = activate(*(("web", sock) for sock in sockets))
    claimed = [registry.obtain(Internet("127.0.0.1", port), name="web").number, registry.claim("web").number]
    claimed.append(registry.claim("web").number)
    assert claimed == [numbers[1], numbers[0], numbers[2]]
    with pytest.raises(LookupError, match="claimed"):
        registry.claim("web")
    registry.close(unlink=True)


def test_anonymous_ones_are_claimed_by_number() -> None:
    registry, numbers = activate(("unknown", make_listener()), ("unknown", make_listener()))
    assert registry.claim(numbers[1]).number == numbers[1]
    assert registry.claim("unknown").number == numbers[0]
    registry.close(unlink=True)


def test_a_connection_is_no_listener_and_says_what_to_change(caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        # Accept=yes, as superservers did it.
        registry, _ = activate(("connection", ours))
        assert registry.entries == ()
        assert "Put Accept=no into the socket unit" in caplog.text
        assert theirs.recv(1) == b""


def test_a_socket_for_both_ip_versions_is_found_by_either_address() -> None:
    for host in ("0.0.0.0", "::"):
        sock = make_listener(socket.AF_INET6, ("::", 0))
        port = sock.getsockname()[1]
        registry, (number,) = activate(("web.socket", sock))
        assert registry.obtain(Internet(host, port)).number == number
        registry.close(unlink=True)


def test_the_kind_has_to_fit() -> None:
    registry, _ = activate(("web", make_listener()))
    entry = registry.obtain(Internet("127.0.0.1", 0, is_datagram=True), name="web")
    assert entry.number is None
    registry.close(unlink=True)


def test_a_path_of_the_manager_is_never_unlinked(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    registry, _ = activate(("web", make_listener(socket.AF_UNIX, str(path))))
    assert registry.obtain(Unix(str(path))).number is not None
    registry.close(unlink=True)
    assert path.exists()


def test_it_is_handed_on_and_stays_claimable_by_name_and_number() -> None:
    registry, (number,) = activate(("web", make_listener()))
    for _ in range(2):
        descriptions, descriptors = registry.describe()
        heir = Registry()
        heir.inherit(descriptions, [os.dup(descriptor) for descriptor in descriptors])
        registry.close(unlink=True)
        registry = heir
        # Nobody has asked for it in this generation: it is kept for the next one.
        assert registry.close_unclaimed() == []
    assert registry.obtain(Internet("127.0.0.1", 1), name="web").number == number
    registry.close(unlink=True)


async def spawn_kept(program: str) -> tuple[Process, socket.socket]:
    """Run a Python program behind a shell; return it with our end of its channel."""
    ours, theirs = socket.socketpair()
    with theirs:
        launch = Launch((sys.executable, "-c", f"import os, socket; c = {CHANNEL}; {program}"), None, dict(os.environ))
        process = await anyio.to_thread.run_sync(lambda: spawn(launch, theirs, 2, is_kept=True))
    ours.setblocking(False)
    return process, ours


CHANNEL = "socket.socket(fileno=int(os.environ['ECDYSIS_CHANNEL'].split(':')[0]))"


@pytest.mark.parametrize(
    ("name", "first_line", "mode", "remedy"),
    [
        ("gone", None, 0, "is not there any more"),
        ("./not-executable", "#!/bin/sh", 0o644, "chmod"),
        ("./orphan", "#!/no/such/python", 0o755, "the interpreter in its first line"),
        ("./fine", "#!/bin/sh", 0o755, None),
    ],
)
async def test_a_program_that_cannot_run_shows_at_once_behind_a_shell(
    tmp_path: Path, name: str, first_line: str | None, mode: int, remedy: str | None
) -> None:
    if first_line is not None:
        (tmp_path / name).write_text(f"{first_line}\n")
        (tmp_path / name).chmod(mode)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        launch = Launch((name,), str(tmp_path), dict(os.environ))
        if remedy is None:
            process = spawn(launch, theirs, 2, is_kept=True)
            assert await process.wait() == 0
            process.close()
        else:
            with pytest.raises(SpawnFailed, match=remedy):
                spawn(launch, theirs, 2, is_kept=True)


@pytest.fixture
def subreaper() -> Iterator[None]:
    """Stand in for systemd: be the parent of those whose parent has died."""
    set_subreaper(enabled=True)
    yield
    set_subreaper(enabled=False)


@pytest.mark.usefixtures("subreaper")
async def test_a_kept_successor_becomes_a_child_of_systemd() -> None:
    process, channel = await spawn_kept("c.send(b'%d %d' % (os.getpid(), os.getppid())); c.recv(1)")
    with channel, anyio.fail_after(60):
        await anyio.wait_readable(channel)
        pid, parent = map(int, channel.recv(64).split())
        assert parent == process.pid != pid
        await process.let_go()
        assert psutil.Process(pid).ppid() == os.getpid()
        channel.send(b"x")
        assert os.waitpid(pid, 0) == (pid, 0)
    process.close()


async def test_a_kept_successor_ends_as_itself() -> None:
    process, channel = await spawn_kept("os.kill(os.getpid(), 9)")
    with channel, anyio.fail_after(60):
        assert await process.wait() == -9
    process.close()


async def test_a_kept_successor_that_does_not_listen_is_killed() -> None:
    program = "import signal; signal.signal(15, signal.SIG_IGN); c.send(b'%d' % os.getpid()); signal.pause()"
    process, channel = await spawn_kept(program)
    with channel, anyio.fail_after(60):
        await anyio.wait_readable(channel)
        pidfd = os.pidfd_open(int(channel.recv(64)))
        try:
            assert await process.end(0.01) == -9
            await wait_for_death(pidfd)
        finally:
            os.close(pidfd)
    process.close()
