"""The control socket of one generation: what it answers, to whom, and that nobody can keep it busy."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import socket
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest

from ecdysis_async import Ecdysis, SpawnFailed
from ecdysis_async._handoff.preflight import describe_place
from ecdysis_async._management import control_connection, control_server
from ecdysis_async._management.control_path import ControlLock
from ecdysis_async._management.control_server import ControlServer
from ecdysis_async._management.management import OwnManagement
from ecdysis_async._system.release import describe_release
from ecdysis_async.report import State

Json = dict[str, Any]

PATIENCE_SECONDS = 60.0

# Successors that come to nothing: at once, and not before they are ended.
FAILING = [sys.executable, "-S", "-c", "import sys; sys.exit('no licence')"]
HANGING = [sys.executable, "-S", "-c", "import signal; signal.pause()"]


@contextlib.asynccontextmanager
async def serving(directory: Path, **options: Any) -> AsyncIterator[tuple[Ecdysis, str]]:
    """Serve nothing but the control socket."""
    path = str(directory / "control")
    with anyio.fail_after(PATIENCE_SECONDS):
        async with Ecdysis(control_socket=path, restart_signals=(), stop_signals=(), **options) as ecdysis:
            await ecdysis.ready()
            yield ecdysis, path


def server_of(ecdysis: Ecdysis) -> ControlServer:
    management = ecdysis._life.management
    assert isinstance(management, OwnManagement)
    assert management._control is not None
    return management._control


async def connect(path: str, data: bytes = b"") -> anyio.abc.SocketStream:
    stream = await anyio.connect_unix(path)
    if data:
        # Refused before it was read to its end: the answer says why.
        with contextlib.suppress(anyio.BrokenResourceError):
            await stream.send(data)
    return stream


async def read_rest(stream: anyio.abc.SocketStream) -> list[Json]:
    """Return everything that is said until the end."""
    data = b""
    # Reset, where something was not read: what was said before is here.
    with contextlib.suppress(anyio.BrokenResourceError):
        async for chunk in stream:
            data += chunk
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


async def ask(path: str, **request: Any) -> list[Json]:
    async with await connect(path, json.dumps(request).encode() + b"\n") as stream:
        return await read_rest(stream)


async def until(is_so: Any) -> None:
    """Wait for something that nobody tells."""
    with anyio.fail_after(PATIENCE_SECONDS):
        while not is_so():  # noqa: ASYNC110
            await anyio.sleep(0.002)


async def test_status(tmp_path: Path) -> None:
    async with serving(tmp_path) as (ecdysis, path):
        host, port = ecdysis.listen_tcp("127.0.0.1", 0, name="http").getsockname()
        ecdysis.listen_tcp("::1", 0, name="http6")
        [answer] = await ask(path, command="status")
        assert answer["event"] == "status"
        status = answer["status"]
        sockets = {each["name"]: (each["address"], each["kind"]) for each in status.pop("listeners")}
        assert sockets["ecdysis control"] == (path, "unix")
        assert sockets["http"] == (f"{host}:{port}", "tcp")
        assert sockets["http6"][0].startswith("[::1]:")
        assert 0 <= status.pop("uptime") < PATIENCE_SECONDS
        assert status == {
            "generation": 1,
            "pid": os.getpid(),
            "state": "serving",
            "stopping": None,
            # Whoever asks is none.
            "connections": 0,
            "jobs": 0,
            "exclusive": [],
            "release": describe_release(),
            "restart_would_run": None,
            "unfollowed_link": None,
            "waiting_for": None,
            "restart": None,
            "last_report": None,
            "draining": [],
            # Of the environment names, and nothing of what they hold.
            "process": {**describe_place(), "environment": sorted(os.environ)},
        }


async def test_its_files_come_and_go(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        async with serving(tmp_path) as (_, path):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
            assert {each.name for each in tmp_path.iterdir()} == {"control", "control.exclusive", "control.lock"}
    finally:
        os.umask(before)
    assert list(tmp_path.iterdir()) == []


async def test_a_live_one_is_not_stolen(tmp_path: Path) -> None:
    other = ControlLock(str(tmp_path / "control"))
    other.acquire(is_family=False)
    with pytest.raises(OSError, match="belongs to a live service"):
        async with serving(tmp_path):
            raise AssertionError("it serves")
    other.release()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(str(tmp_path / "control"))
        stranger.listen()
        with pytest.raises(OSError, match="another socket has this address"):
            async with serving(tmp_path):
                raise AssertionError("it serves")
        assert {each.name for each in tmp_path.iterdir()} == {"control"}
    # Now it is stale.
    async with serving(tmp_path) as (_, path):
        await ask(path, command="status")


async def test_a_directory_that_is_not_safe_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match="chmod go-w"):
        async with serving(tmp_path):
            raise AssertionError("it serves")
    assert list(tmp_path.iterdir()) == []


REQUESTS = {
    "garbage": (b"garbage\n", "one JSON object in a line is"),
    "no text": (b"\xff\xfe\x00\n", "one JSON object in a line is"),
    "nothing": (b"\n", "one JSON object in a line is"),
    "nested": (b"[" * 60_000 + b"\n", "one JSON object in a line is"),
    "a long number": (b"9" * 60_000 + b"\n", "one JSON object in a line is"),
    "a long line": (b"x" * 1_000_000, "longer than 65536 bytes"),
    "no object": (b"[]\n", "there is no such request"),
    "no command": (b"{}\n", "there is no such request"),
    "unknown command": (b'{"command": "dance"}\n', "there is no such request"),
    "no until": (b'{"command": "restart"}\n', "there is no such request"),
    "unknown until": (b'{"command": "restart", "until": ["settled"]}\n', "there is no such request"),
    "no id": (b'{"command": "verdict"}\n', "there is no such request"),
}


async def test_what_is_no_request(tmp_path: Path) -> None:
    async with serving(tmp_path) as (ecdysis, path):
        for name, (data, message) in REQUESTS.items():
            async with await connect(path, data) as stream:
                [answer] = await read_rest(stream)
            assert answer["event"] == "error", name
            assert message in answer["message"], name
        assert ecdysis.last_report is None
        [answer] = await ask(path, command="status")
        assert answer["status"]["state"] == "serving"


async def test_a_request_may_end_with_the_sending(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, path):
        for data, event in ((b'{"command": "status"}', "status"), (b'{"comm', "error")):
            async with await connect(path, data) as stream:
                await stream.send_eof()
                [answer] = await read_rest(stream)
                assert answer["event"] == event


async def test_half_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "REQUEST_SECONDS", 0.05)
    async with serving(tmp_path) as (_, path), await connect(path, b'{"command": "sta') as stream:
        [answer] = await read_rest(stream)
        assert answer["message"].startswith("no request came within 0.05 seconds")


async def test_clients_that_leave_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path) as (_, path):
        for data in (b"", b'{"command": "sta'):
            await (await connect(path, data)).aclose()
        await ask(path, command="status")
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_hundred_who_say_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as (ecdysis, path):
        async with contextlib.AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(await connect(path)) for _ in range(100)]
            [answer] = await ask(path, command="status")
            assert (answer["event"], answer["status"]["connections"]) == ("status", 0)
            # The oldest had to make way.
            [answer] = await read_rest(streams[0])
            assert answer["event"] == "error"
            assert server_of(ecdysis)._clients <= control_server.MAX_CLIENTS
        server = server_of(ecdysis)
        await until(lambda: not server._clients)


async def test_more_than_can_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "MAX_CLIENTS", 1)
    async with serving(tmp_path, command=HANGING) as (ecdysis, path):
        async with await connect(path, b'{"command": "restart", "until": "settled"}\n') as stream:
            assert b"accepted" in await stream.receive()
            [answer] = await ask(path, command="status")
            assert answer == {"event": "error", "message": "1 others ask already: try again later"}
        ecdysis.stop()


async def test_a_restart_that_fails(tmp_path: Path) -> None:
    async with serving(tmp_path, command=FAILING) as (ecdysis, path):
        accepted, *phases, failed = await ask(path, command="restart", until="settled")
        assert (accepted["event"], accepted["pid"]) == ("accepted", os.getpid())
        assert {each["event"] for each in phases} == {"phase"}
        assert re.match(r"generation 2( \(pid \d+\))? to start, for \d", phases[0]["waiting_for"])
        assert (failed["event"], failed["error"], failed["phase"]) == ("failed", "SuccessorFailed", "start")
        assert "  | no licence" in failed["message"]
        report = failed["report"]
        assert (report["id"], report["outcome"]) == (accepted["id"], "failed")
        assert ecdysis.state is State.SERVING
        assert await ask(path, command="verdict", id=accepted["id"]) == [{"event": "verdict", "report": report}]
        assert await ask(path, command="verdict", id="another") == [{"event": "unknown"}]
        [answer] = await ask(path, command="status")
        assert answer["status"]["last_report"] == report


async def test_a_second_restart_and_the_status_of_the_first(tmp_path: Path) -> None:
    async with serving(tmp_path, command=HANGING) as (ecdysis, path):
        stream = await connect(path, b'{"command": "restart", "until": "settled"}\n')
        async with stream:
            id = json.loads((await stream.receive()).splitlines()[0])["id"]
            [failed] = await ask(path, command="restart", until="settled")
            assert (failed["event"], failed["error"], failed["report"]) == ("failed", "RestartInProgress", None)
            await until(lambda: ecdysis.last_report is not None and ecdysis.last_report.successor_pid is not None)
            [answer] = await ask(path, command="status")
            restart = answer["status"]["restart"]
            assert (restart["id"], restart["generation"], restart["phase"]) == (id, 2, "spawning")
            assert f"generation 2 (pid {restart['pid']}) to start" in answer["status"]["waiting_for"]
            ecdysis.stop()
            *_, failed = await read_rest(stream)
            assert failed["error"] == "RestartWhileDraining"


async def test_a_client_that_leaves_changes_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path, command=FAILING) as (ecdysis, path):
        await (await connect(path, b'{"command": "restart", "until": "settled"}\n')).aclose()
        await until(lambda: ecdysis.last_report is not None and ecdysis.last_report.outcome == "failed")


async def test_a_stop_is_heard_from_one_who_has_left(tmp_path: Path) -> None:
    async with serving(tmp_path) as (ecdysis, path):
        await (await connect(path, b'{"command": "stop"}\n')).aclose()
        await ecdysis.finished()


async def test_a_client_that_never_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "HEARTBEAT_SECONDS", 0)
    monkeypatch.setattr(control_connection, "ANSWER_SECONDS", 0.05)
    async with serving(tmp_path, command=HANGING) as (ecdysis, path):
        silent = await connect(path, b'{"command": "restart", "until": "settled"}\n')
        async with silent:
            await until(lambda: ecdysis.last_report is not None)
            # Its queue is full, and it is let go; the restart goes on.
            await until(lambda: not server_of(ecdysis)._clients)
            [answer] = await ask(path, command="status")
            assert answer["status"]["restart"]["phase"] == "spawning"
        ecdysis.stop()


async def test_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "HEARTBEAT_SECONDS", 0.01)
    async with anyio.create_task_group() as task_group:
        answers: list[Json] = []
        release = anyio.Event()

        async def stop(path: str) -> None:
            answers.extend(await ask(path, command="stop"))

        async def work(ecdysis: Ecdysis) -> None:
            async with ecdysis.track():
                await release.wait()

        async with serving(tmp_path, drain_timeout=PATIENCE_SECONDS) as (ecdysis, path):
            task_group.start_soon(work, ecdysis)
            await until(lambda: ecdysis.connections)
            task_group.start_soon(stop, path)
            await ecdysis.finished()
            await until(lambda: server_of(ecdysis).controlled.waiting_for() is not None)
            # Who asks is still answered.
            [answer] = await ask(path, command="status")
            assert answer["status"]["state"] == "draining"
            assert answer["status"]["waiting_for"].startswith("1 job, deadline in ")
            [failed] = await ask(path, command="restart", until="settled")
            assert failed["error"] == "RestartWhileDraining"
            release.set()
    accepted, *phases, done = answers
    assert (accepted, done) == ({"event": "accepted", "pid": os.getpid()}, {"event": "done"})
    assert any(str(each["waiting_for"]).startswith("1 job, deadline in ") for each in phases)


async def test_nobody_who_looks_on_holds_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "FAREWELL_SECONDS", 0.05)
    monkeypatch.setattr(control_server, "HEARTBEAT_SECONDS", 0)
    async with contextlib.AsyncExitStack() as stack, serving(tmp_path, drain_timeout=600) as (ecdysis, path):
        for data in (b"", b'{"command"', b'{"command": "stop"}\n'):
            await stack.enter_async_context(await connect(path, data))
        await ecdysis.finished()
        assert ecdysis.connections == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else for a moment")
async def test_other_users_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as (_, path):
        # As nobody ever should; so that the kernel lets them in, and only the peer's credentials are left to tell.
        tmp_path.chmod(0o755)
        os.chmod(path, 0o666)
        # From within, because the directories above belong to root alone.
        monkeypatch.chdir(tmp_path)
        sock = socket.socket(socket.AF_UNIX)
        os.seteuid(65534)
        try:
            sock.connect("control")
        finally:
            os.seteuid(0)
        async with await anyio.abc.UNIXSocketStream.from_socket(sock) as stream:
            [answer] = await read_rest(stream)
        assert answer["event"] == "error"
        assert answer["message"].startswith("uid 65534 may not control a service of uid 0")


async def test_a_request_that_fails_ends_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path, command=[str(tmp_path / "missing")]) as (ecdysis, path):
        with pytest.raises(SpawnFailed):
            await ecdysis.restart()
        # What cannot be put into JSON.
        assert ecdysis.last_report is not None
        ecdysis.last_report.error = object()  # type: ignore[assignment]
        [answer] = await ask(path, command="status")
        assert answer["event"] == "error"
        assert answer["message"].startswith("the service could not do that: TypeError(")
        assert "a request on the control socket failed" in caplog.text
        ecdysis.last_report.error = None
        await ask(path, command="status")


async def test_a_request_that_fails_is_answered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path) as (ecdysis, path):

        async def fail() -> int:
            raise OSError("the disk is gone")

        server = server_of(ecdysis)
        server.controlled = dataclasses.replace(server.controlled, reopen_logs=fail)
        [answer] = await ask(path, command="reopen-logs")
        assert answer["message"] == "the service could not do that: OSError('the disk is gone'); see its log"
        assert [each["event"] for each in await ask(path, command="status")] == ["status"]
    assert "a request on the control socket failed" in caplog.text


async def test_reopen_logs(tmp_path: Path) -> None:
    handler = logging.FileHandler(tmp_path / "app.log")
    logger = logging.getLogger("an application")
    logger.addHandler(handler)
    try:
        async with serving(tmp_path) as (_, path):
            logger.warning("one")
            assert await ask(path, command="reopen-logs") == [{"event": "reopened", "handlers": 0}]
            (tmp_path / "app.log").rename(tmp_path / "app.log.1")
            assert await ask(path, command="reopen-logs") == [{"event": "reopened", "handlers": 1}]
            logger.warning("two")
    finally:
        logger.removeHandler(handler)
        handler.close()
    assert (tmp_path / "app.log.1").read_text() == "one\n"
    assert (tmp_path / "app.log").read_text() == "two\n"


async def test_reopening_logs_ends_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Unready(logging.NullHandler):
        @property
        def listener(self) -> object:
            raise RuntimeError("it has not begun to listen")

    handler, logger = Unready(), logging.getLogger("an application")
    logger.addHandler(handler)
    try:
        async with serving(tmp_path) as (ecdysis, path):
            # What SIGUSR1 does, which is another's where the tests run.
            ecdysis._task_group.start_soon(ecdysis._life.generation.reopen_logs)
            await until(lambda: "it has not begun to listen" in caplog.text)
            assert [each["event"] for each in await ask(path, command="status")] == ["status"]
    finally:
        logger.removeHandler(handler)


async def test_another_service_in_the_place_of_a_removed_one_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Its lock file was removed, and so could a third service have begun beside it.
    async with serving(tmp_path) as (ecdysis, path):
        server = server_of(ecdysis)
        assert server is not None
        for each in tmp_path.iterdir():
            each.unlink()
        other = ControlLock(path)
        other.acquire(is_family=False)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)
            sock.listen()
            for _ in range(2):
                await server.renew()
                assert caplog.text.count("another service has it now") == 1
            assert {each.name for each in tmp_path.iterdir()} == {"control", "control.lock"}
            assert not other.is_removed()
        # It ends, and as it was killed, all of it stays.
        os.close(other._descriptor)
        await server.renew()
        assert [each["event"] for each in await ask(path, command="status")] == ["status"]
        # The socket alone: the lock is held all the while.
        os.unlink(path)
        inode = os.stat(f"{path}.lock").st_ino
        await server.renew()
        assert os.stat(f"{path}.lock").st_ino == inode
        assert [each["event"] for each in await ask(path, command="status")] == ["status"]
    assert list(tmp_path.iterdir()) == []


async def test_workers_are_told_of(tmp_path: Path) -> None:
    """Whoever speaks for several processes tells of each of them, on the way to the end of a restart."""
    workers: list[Json] = [{"slot": 1, "waiting_for": "generation 2 to get ready"}, {"slot": 2, "waiting_for": None}]
    async with serving(tmp_path, command=FAILING) as (ecdysis, path):
        server = server_of(ecdysis)
        server.controlled = dataclasses.replace(server.controlled, workers=lambda: workers)
        answers = await ask(path, command="restart", until="serving")
        assert {"phase"} == {each["event"] for each in answers if each.get("workers") == workers}
