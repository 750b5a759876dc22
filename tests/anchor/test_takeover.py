"""A whole service passes from one anchor to another: each side waits for the other's word."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ecdysis_async._anchor import reexec, takeover
from ecdysis_async._anchor.takeover import Takeover, ask_for_service, hear_taken, let_go, offer_service
from ecdysis_async._ipc.channel import encode
from ecdysis_async._system.descriptors import send_with_descriptors
from ecdysis_async.errors import TakeoverFailed


def pass_service_on(channel: socket.socket, body: dict[str, Any], numbers: Sequence[int]) -> None:
    """Be the former anchor, from the state to the last word."""
    offer_service(channel, body, numbers)
    hear_taken(channel)
    let_go(channel)


class Former:
    """The former anchor: its control socket answers once, and then the service is passed on, by a thread of its own."""

    def __init__(self, path: Path, executor: ThreadPoolExecutor) -> None:
        self.path = str(path)
        self._executor = executor
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self.request: dict[str, Any] = {}

    def serve(self, talk: Callable[[socket.socket], None]) -> Future[None]:
        """Begin to answer, and to talk over the channel."""
        return self._executor.submit(self._serve, talk)

    def _serve(self, talk: Callable[[socket.socket], None]) -> None:
        ours, theirs = socket.socketpair()
        with ours:
            with self._listener.accept()[0] as client, theirs:
                self.request = json.loads(client.recv(4096))
                socket.send_fds(
                    client, [json.dumps({"event": "accepted", "pid": os.getpid()}).encode() + b"\n"], [theirs.fileno()]
                )
            talk(ours)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def former(tmp_path: Path) -> Iterator[Former]:
    with ThreadPoolExecutor() as executor:
        found = Former(tmp_path / "control", executor)
        yield found
        found.close()


class Parts(NamedTuple):
    """What a service consists of: descriptors, and the process of a worker."""

    read_end: int
    write_end: int
    pidfd: int
    worker: int

    @property
    def numbers(self) -> list[int]:
        return [self.read_end, self.write_end, self.pidfd]


@pytest.fixture
def parts() -> Iterator[Parts]:
    read_end, write_end = os.pipe()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as worker:
        pidfd = os.pidfd_open(worker.pid)
        yield Parts(read_end, write_end, pidfd, worker.pid)
        worker.kill()
    for each in (read_end, write_end, pidfd):
        os.close(each)


def make_body(parts: Parts) -> dict[str, Any]:
    """Return a state with a worker, a socket and signals, each of which has a descriptor."""
    return {
        "crew": {"workers": [{"process": parts.worker, "pidfd": parts.pidfd, "line": parts.write_end}]},
        "sockets": {"service": {"descriptors": [parts.write_end]}},
        "signals": parts.read_end,
    }


def close(taken: Takeover) -> None:
    (worker,) = taken.state["crew"]["workers"]
    mine = {worker["pidfd"], worker["line"], taken.state["signals"]}
    for descriptor in {*mine, *taken.state["sockets"]["service"]["descriptors"]}:
        os.close(descriptor)


def test_everything_is_passed_on_and_confirmed(former: Former, parts: Parts) -> None:
    passing = former.serve(lambda channel: pass_service_on(channel, make_body(parts), parts.numbers))
    taken = ask_for_service(former.path)
    assert not passing.done()
    taken.confirm()
    passing.result()
    assert former.request == {"command": "takeover", "anchor": reexec.FORMAT}
    assert taken.former_pid == os.getpid()
    # Descriptors have other numbers here, and lead to the same.
    (worker,) = taken.state["crew"]["workers"]
    assert worker["line"] not in parts
    os.write(worker["line"], b"x")
    assert os.read(taken.state["signals"], 1) == b"x"
    close(taken)


def test_a_newcomer_that_leaves_with_the_state_in_hand_takes_nothing(former: Former, parts: Parts) -> None:
    passing = former.serve(lambda channel: pass_service_on(channel, make_body(parts), parts.numbers))
    taken = ask_for_service(former.path)
    close(taken)
    taken._sock.close()
    os.close(taken._pidfd)
    with pytest.raises(TakeoverFailed, match="does not take it"):
        passing.result()


def test_a_newcomer_that_says_something_else_takes_nothing(parts: Parts) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(encode("thanks", {}, 0))
        with pytest.raises(TakeoverFailed, match="it answers with 'thanks'"):
            pass_service_on(ours, make_body(parts), parts.numbers)


def test_a_former_anchor_that_hangs_up_and_lives_goes_on(
    former: Former, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(takeover, "DEATH_GRACE_MILLISECONDS", 10)

    def hang_up(channel: socket.socket) -> None:
        with contextlib.suppress(TakeoverFailed):
            pass_service_on(_Deaf(channel.detach()), make_body(parts), parts.numbers)

    passing = former.serve(hang_up)
    taken = ask_for_service(former.path)
    close(taken)
    with pytest.raises(TakeoverFailed, match="goes on"):
        taken.confirm()
    passing.result()


class _Deaf(socket.socket):
    """A socket whose owner sends all it has, and hangs up instead of hearing the answer."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(fileno=descriptor)

    def recvmsg(self, *arguments: Any) -> Any:
        self.close()
        raise ConnectionResetError


def test_a_former_anchor_that_is_dead_has_had_its_last_word(
    former: Former, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pidfd = os.pidfd_open(dead.pid)
    monkeypatch.setattr(os, "pidfd_open", lambda pid: pidfd)

    def hang_up(channel: socket.socket) -> None:
        with contextlib.suppress(TakeoverFailed):
            pass_service_on(_Deaf(channel.detach()), make_body(parts), parts.numbers)

    passing = former.serve(hang_up)
    taken = ask_for_service(former.path)
    passing.result()
    taken.confirm()
    close(taken)


@pytest.mark.parametrize("mistake", ["format", "numbers", "state", "end"])
def test_what_cannot_be_read_is_refused(mistake: str, former: Former, parts: Parts) -> None:
    body: dict[str, Any] = make_body(parts)
    match mistake:
        case "format":
            body["format"] = reexec.FORMAT + 1
        case "state":
            del body["signals"]

    def talk(channel: socket.socket) -> None:
        if mistake != "end":
            with contextlib.suppress(TakeoverFailed):
                pass_service_on(channel, body, parts.numbers if mistake != "numbers" else parts.numbers[:1])

    passing = former.serve(talk)
    with pytest.raises(TakeoverFailed, match="another one" if mistake == "format" else "cannot be read"):
        ask_for_service(former.path)
    passing.result()


def test_nobody_is_there(tmp_path: Path) -> None:
    with pytest.raises(TakeoverFailed, match="there is no service to take over"):
        ask_for_service(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        ({"process": 1}, "process 1, which the service hands over, is no worker"),
        ({"pidfd": "no pidfd"}, "this descriptor is no pidfd"),
        ({"pidfd": "of a stranger"}, "is no worker of it"),
    ],
)
def test_a_process_that_is_no_worker_is_not_taken(
    claim: dict[str, Any], expected: str, former: Former, parts: Parts
) -> None:
    stranger = os.pidfd_open(os.getppid())
    try:
        claim = {**claim, **{"no pidfd": {"pidfd": parts.read_end}}.get(claim.get("pidfd", ""), {})}
        if claim.get("pidfd") == "of a stranger":
            claim = {"pidfd": stranger, "process": os.getppid()}
        body = make_body(parts)
        body["crew"]["workers"][0].update(claim)

        def talk(channel: socket.socket) -> None:
            with contextlib.suppress(TakeoverFailed):
                pass_service_on(channel, body, [*parts.numbers, stranger])

        passing = former.serve(talk)
        with pytest.raises(TakeoverFailed, match=expected):
            ask_for_service(former.path)
        passing.result()
    finally:
        os.close(stranger)


def test_an_anchor_that_speaks_for_another_is_not_believed(former: Former, parts: Parts) -> None:
    """Otherwise it could name the parent of any process as the anchor, and the process as a worker."""

    def talk(channel: socket.socket) -> None:
        memory = reexec.seal(make_body(parts))
        pidfd = os.pidfd_open(os.getppid())
        frame = encode("state", {"pid": os.getppid(), "numbers": parts.numbers}, 2 + len(parts.numbers))
        send_with_descriptors(channel, frame, [memory, pidfd, *parts.numbers])
        os.close(memory)
        os.close(pidfd)

    passing = former.serve(talk)
    with pytest.raises(TakeoverFailed, match="does not speak for itself"):
        ask_for_service(former.path)
    passing.result()


def test_a_word_that_comes_slowly_has_one_deadline(
    former: Former, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(takeover, "ANSWER_SECONDS", 0.5)
    is_over = threading.Event()

    def talk(channel: socket.socket) -> None:
        frame = encode("state", {"pid": os.getpid(), "numbers": []}, 0)
        with contextlib.suppress(OSError):
            for byte in frame[:-1]:
                channel.sendall(bytes([byte]))
                is_over.wait(0.2)

    passing = former.serve(talk)
    with pytest.raises(TakeoverFailed, match="cannot be read: TimeoutError"):
        ask_for_service(former.path)
    is_over.set()
    passing.result()
