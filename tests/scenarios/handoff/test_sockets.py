"""The sockets of a service over its generations: inherited, created, unclaimed, and the paths of Unix sockets."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scenarios.handoff.harness import PATIENCE_SECONDS, TIME_IS_UP, Clients, Conversation, Refused, Service

pytestmark = pytest.mark.main_python_only

Run = Callable[..., Service]

FIRST = ["listen_tcp", ["127.0.0.1", 0], {}]


@pytest.mark.backends("asyncio", "uvloop", "anyio", "trio")
def test_a_unix_path_is_the_same_to_the_end(backend: str, run_service: Run, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    service = run_service(backend, listeners=[["listen_unix", [str(path)], {}]])
    inode = path.stat().st_ino
    with Clients(service.address) as clients:
        for _ in range(2):
            clients.wait_for(service.restart("settled")["successor_pid"])
            assert path.stat().st_ino == inode
    assert (clients.refused, clients.lost) == ([], [])
    service.configure(at_start="raise OSError")
    service.fail_to_restart()
    assert path.stat().st_ino == inode
    service.expected_blemishes = ("Traceback (most",)
    service.stop()
    assert not path.exists()


@pytest.mark.backends("asyncio", "uvloop", "trio")
def test_what_nobody_claims_is_answered_to_the_end_and_named(backend: str, run_service: Run) -> None:
    listeners = [FIRST, ["listen_tcp", ["127.0.0.1", 0], {"name": "old"}]]
    service = run_service(backend, listeners=listeners, ecdysis={"probation": 60})
    first, old = service.pids[0], service.addresses[1]
    service.configure(listeners=[FIRST])
    with service.begin("hello") as control:
        control.answer()
        with Clients(old) as clients:
            clients.wait_for(first)
            report = service.restart("serving")
            assert (report["inherited"], report["unclaimed"]) == (["tcp:127.0.0.1:0"], ["old"])
            clients.wait_for(first)
        with Conversation(old) as late:
            # The end of the probation, at which it listens there no more.
            control.say("run", code=TIME_IS_UP).answer()
            service.wait_for("predecessor", state="settled", pid=first)
            assert late.say("hello").answer()["pid"] == first
    assert (clients.refused, clients.lost) == ([], [])
    service.wait_for_log("generation 2 did not claim old")
    service.wait_for_death(first)
    with pytest.raises(Refused):
        Conversation(old)


# A second socket of the first one's port, and what holds its end up until the test has seen that nobody waits on it.
SHARED_PORT = """
port = listeners[0].getsockname()[1]
listeners.append(ecdysis.listen_tcp("127.0.0.1", port, reuse_port=True))
async def remove_later(acceptor):
    if held and acceptor.entry in held.pop()._life.handover.unclaimed:
        await wait()
    await remove(acceptor)
remove, held = ecdysis._gate.remove, [ecdysis]
ecdysis._gate.remove = remove_later
"""


@pytest.mark.backends("asyncio", "uvloop", "trio")
def test_two_sockets_of_a_port_are_inherited_and_one_goes_without_a_loss(backend: str, run_service: Run) -> None:
    """Trap 11: the second socket of a port takes its queue along when it is closed."""
    first = ["listen_tcp", ["127.0.0.1", 0], {"reuse_port": True}]
    service = run_service(backend, listeners=[first], at_start=SHARED_PORT)
    inodes = "[os.fstat(each.fileno()).st_ino for each in listeners]"
    before = service.run(inodes)
    with Clients(service.address) as clients:
        report = service.restart("settled")
        assert (len(report["inherited"]), report["created"], report["unclaimed"]) == (2, [], [])
        assert service.run(inodes) == before
        service.configure(at_start="")
        assert len(service.restart("settled")["unclaimed"]) == 1
        service.wait_for("waiting")
        # The kernel gives half of them the socket that is about to be closed; they ask again in a second.
        with contextlib.ExitStack() as stack:
            late = [stack.enter_context(socket.socket()) for _ in range(20)]
            for each in late:
                each.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    each.connect(tuple(service.address))
            service.release()
            for each in late:
                each.settimeout(PATIENCE_SECONDS)
                # Writable once it is connected, or refused.
                select.select([], [each], [], PATIENCE_SECONDS)
                each.sendall(b'{"do": "hello"}\n')
                assert json.loads(each.recv(100))["generation"] == 3
        clients.wait_for(service.newest())
    assert (clients.refused, clients.lost) == ([], [])


@pytest.mark.backends("asyncio", "trio")
def test_what_is_closed_before_ready_is_as_good_as_unclaimed(backend: str, run_service: Run) -> None:
    """And none of the others is taken for it."""
    closed, other = (["listen_tcp", ["127.0.0.1", 0], {"name": name}] for name in ("closed", "other"))
    service = run_service(backend, listeners=[FIRST, closed, other])
    close = """
sock = ecdysis.listen_tcp("127.0.0.1", 0, name="closed")
ecdysis._registry.release(next(entry for entry in ecdysis._registry.entries if entry.sock is sock))
"""
    service.configure(listeners=[FIRST, other], at_start=close)
    report = service.restart("settled")
    assert (report["inherited"], report["unclaimed"]) == (["tcp:127.0.0.1:0", "other"], ["closed"])
    with Conversation(service.addresses[2]) as conversation:
        assert conversation.say("hello").answer()["generation"] == 2


@pytest.mark.backends("asyncio", "uvloop", "trio")
def test_what_is_created_listens_only_from_the_commit(backend: str, run_service: Run, tmp_path: Path) -> None:
    path = str(tmp_path / "new")
    service = run_service(backend)
    service.configure(listeners=[FIRST, ["listen_unix", [path], {}]], at_start="await wait()")
    with service.begin("restart", until="serving") as asking:
        service.wait_for("waiting")
        with pytest.raises(Refused):
            Conversation(path)
        service.release()
        report = asking.answer()
    assert report["created"] == [f"unix:{path}"]
    with Conversation(path) as conversation:
        assert conversation.say("hello").answer()["generation"] == 2


@pytest.mark.backends("asyncio", "trio")
def test_a_thousand_sockets(backend: str, run_service: Run) -> None:
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))"
    many = f"""
many = [ecdysis.listen_unix(f"@{os.getpid()}-{backend}-{{number}}") for number in range(1000)]
inodes = sorted(os.fstat(each.fileno()).st_ino for each in many)
"""
    service = run_service(backend, at_import=limit, at_start=many)
    inodes = service.run("inodes")
    report = service.restart("settled")
    assert (len(report["inherited"]), report["created"], report["unclaimed"]) == (1001, [], [])
    assert service.run("[inodes, ecdysis.generation]") == [inodes, 2]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"\0{os.getpid()}-{backend}-999")


def test_a_path_that_was_removed_is_made_anew_and_a_restart_that_fails_leaves_none(
    backend: str, run_service: Run, tmp_path: Path
) -> None:
    path = tmp_path / "lost.sock"
    service = run_service(backend, listeners=[FIRST, ["listen_unix", [str(path)], {"mode": 0o600}]])
    path.unlink()
    # It ends in order, or as by the kernel's hand, with the path made.
    for end in ("raise OSError('no database')", f"assert os.path.exists({str(path)!r}); os.kill(os.getpid(), 9)"):
        service.configure(at_start=end)
        assert service.fail_to_restart()["error"] == "SuccessorFailed"
        assert not path.exists()
    service.configure(at_start="", listeners=[FIRST, ["listen_unix", [str(path)], {"mode": 0o660}]])
    service.restart("settled")
    assert path.stat().st_mode & 0o777 == 0o660
    inode = path.stat().st_ino
    service.configure(listeners=[FIRST, ["listen_unix", [str(path)], {"mode": 0o666}]])
    service.restart("settled")
    assert (path.stat().st_mode & 0o777, path.stat().st_ino) == (0o666, inode)
    service.expected_blemishes = ("Traceback (most",)
