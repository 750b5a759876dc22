"""The death of an anchor, seen by a thread of its worker: real processes that die, and sockets that stop listening."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ecdysis_async._service.anchor_watch import AnchorWatch
from ecdysis_async._sockets.addresses import Internet, Unix
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._sockets.registry import Registry

PATIENCE_SECONDS = 60

# It has the other end of the link, and says something when it is told to.
ANCHOR = """
import socket, sys
link = socket.socket(fileno=int(sys.argv[1]))
for line in sys.stdin:
    link.send(b"x") if line == "say something\\n" else link.close()
"""


@pytest.fixture(autouse=True)
def default_signal() -> Iterator[None]:
    """Let nobody have a use for the signal, whatever other tests have done in this process."""
    signal.signal(signal.SIGURG, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGURG, signal.SIG_DFL)


@dataclass
class Watched:
    """A worker's watch, and the process that it takes for its anchor."""

    anchor: subprocess.Popen[bytes]
    watch: AnchorWatch
    link: socket.socket
    died: threading.Event = field(default_factory=threading.Event)

    def tell(self, what: str) -> None:
        assert self.anchor.stdin is not None
        self.anchor.stdin.write(f"{what}\n".encode())
        self.anchor.stdin.flush()

    def kill(self) -> None:
        self.anchor.kill()
        self.anchor.wait()


@contextlib.contextmanager
def watching(*entries: Entry) -> Iterator[Watched]:
    ours, theirs = socket.socketpair()
    died = threading.Event()
    with ours:
        with theirs:
            command = [sys.executable, "-c", ANCHOR, str(theirs.fileno())]
            anchor = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()])
        watch = AnchorWatch(ours, lambda: entries, died.set)
        try:
            watch.watch(anchor.pid)
            yield Watched(anchor, watch, ours, died)
        finally:
            watch.close()
            watch.close()
            anchor.kill()
            anchor.communicate()


def wait_until_refused(entry: Entry) -> None:
    """Connect until nobody is let in any more."""
    for _ in range(PATIENCE_SECONDS * 100):
        with socket.socket(entry.sock.family) as client:
            client.settimeout(PATIENCE_SECONDS)
            try:
                client.connect(entry.sock.getsockname())
            except (ConnectionRefusedError, FileNotFoundError):
                return
        threading.Event().wait(0.01)
    raise AssertionError("it still listens")


def test_the_address_is_free_though_the_socket_stays_open() -> None:
    registry = Registry()
    entry = registry.obtain(Internet("127.0.0.1", 0))
    entry.start_listening()
    with watching(entry) as watched:
        assert not watched.watch.is_proven
        watched.kill()
        assert watched.died.wait(PATIENCE_SECONDS)
        assert watched.watch.is_proven
        wait_until_refused(entry)
        with socket.create_server(entry.sock.getsockname()):
            pass
    registry.close(unlink=True)


def test_a_path_is_free(tmp_path: Path) -> None:
    registry = Registry()
    entry = registry.obtain(Unix(str(tmp_path / "socket")))
    entry.start_listening()
    with watching(entry) as watched:
        watched.kill()
        wait_until_refused(entry)
    registry.close(unlink=True)


def test_the_end_of_the_link_alone_is_no_death() -> None:
    registry = Registry()
    entry = registry.obtain(Internet("127.0.0.1", 0))
    entry.start_listening()
    with watching(entry) as watched:
        # The process lives, and the link has ended all the same.
        watched.tell("end the link")
        for _ in range(PATIENCE_SECONDS * 100):
            if watched.watch._has_thread:
                break
            threading.Event().wait(0.01)
        assert watched.watch._running.acquire(timeout=PATIENCE_SECONDS)
        watched.watch._running.release()
        assert not watched.died.is_set()
        assert entry.is_listening()
    registry.close(unlink=True)


def test_there_is_no_thread_before_the_link_has_ended() -> None:
    """A thread would make each fork of the application warn (Python 3.12)."""
    with watching() as watched:
        # What the anchor says sends the signal as well.
        watched.tell("say something")
        # A loop waits like this. While somebody waits in recv itself, the kernel sends no signal.
        assert select.select([watched.link], [], [], PATIENCE_SECONDS)[0]
        assert watched.link.recv(1) == b"x"
        assert not watched.watch._has_thread
        assert signal.getsignal(signal.SIGURG) is not signal.SIG_DFL
        # A forked child has the handler that it would have without us.
        assert subprocess_of(lambda: signal.getsignal(signal.SIGURG) is signal.SIG_DFL)
        watched.kill()
        assert watched.died.wait(PATIENCE_SECONDS)
    assert signal.getsignal(signal.SIGURG) is signal.SIG_DFL


def subprocess_of(ask: Callable[[], bool]) -> bool:
    """Ask something in a forked child."""
    with warnings.catch_warnings():
        # The runner of the tests has threads of its own.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os._exit(int(not ask()))
    return os.waitpid(pid, 0)[1] == 0


def test_where_the_signal_has_another_use_a_thread_watches() -> None:
    former = signal.signal(signal.SIGURG, lambda number, frame: None)
    try:
        with watching() as watched:
            assert watched.watch._has_thread
            watched.kill()
            assert watched.died.wait(PATIENCE_SECONDS)
    finally:
        signal.signal(signal.SIGURG, former)


def test_outside_of_the_main_thread_a_thread_watches() -> None:
    def watch() -> None:
        with watching() as watched:
            watched.kill()
            assert watched.died.wait(PATIENCE_SECONDS)
        done.set()

    done = threading.Event()
    threading.Thread(target=watch).start()
    assert done.wait(PATIENCE_SECONDS)


def test_another_process_may_be_the_anchor_by_now() -> None:
    with watching() as first, watching() as second:
        first.watch.watch(second.anchor.pid)
        first.kill()
        assert not first.watch.is_proven
        second.kill()
        assert first.watch.is_proven


def test_an_anchor_that_had_died_before_it_could_be_watched() -> None:
    with watching() as watched, subprocess.Popen([sys.executable, "-c", ""]) as other:
        other.wait()
        watched.watch.watch(other.pid)
        assert watched.watch.is_proven


@pytest.mark.parametrize("is_begun", [True, False])
def test_a_watch_that_is_closed_leaves_no_thread(*, is_begun: bool) -> None:
    before = set(threading.enumerate())
    ours, theirs = socket.socketpair()
    with ours, theirs:
        watch = AnchorWatch(ours, list, lambda: None)
        if is_begun:
            with watching() as watched:
                watch.watch(watched.anchor.pid)
        watch.close()
    # Threads of other tests may end meanwhile.
    assert set(threading.enumerate()) <= before


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # threads, and a fork
def test_a_forked_child_does_not_keep_the_thread() -> None:
    read_end, write_end = os.pipe()
    before = set(threading.enumerate())
    with watching():
        if (child := os.fork()) == 0:
            os.close(write_end)
            os.read(read_end, 1)
            os._exit(0)
    assert set(threading.enumerate()) <= before
    os.close(write_end)
    assert os.waitpid(child, 0) == (child, 0)
    os.close(read_end)
