"""What becomes of connections on their way, if a real successor takes them badly: they stay, and nothing leaks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ecdysis_async._connections.parcel import BATCH
from tests.scenarios.transfer.subreaper import subreaper
from tests.test_examples import Service

pytestmark = pytest.mark.main_python_only

CLIENTS = 160
# So many leave while their connections are on their way.
LEAVING = 20

PATIENCE_SECONDS = 60.0


@pytest.fixture(autouse=True)
def orphans() -> Iterator[None]:
    with subreaper():
        yield


def serving(pid: int) -> int:
    """Return how many clients a process has."""
    return sum(each.status == psutil.CONN_ESTABLISHED for each in psutil.Process(pid).net_connections("tcp"))


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for something in another process, of which nothing tells."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_clients(pid: int, number: int) -> None:
    """Wait until a process has so many clients."""
    wait_until(lambda: serving(pid) == number)


def others(pid: int) -> int:
    """Return how many descriptors a process has beside its clients."""
    return psutil.Process(pid).num_fds() - serving(pid)


def ask(client: socket.socket) -> bytes:
    """Send a line, and return the one that answers it; nothing, where the connection has ended."""
    with contextlib.suppress(ConnectionError):
        client.sendall(b"hello\n")
        return client.recv(64)
    return b""


def answers(clients: list[socket.socket], count: int) -> list[int]:
    """Ask each client's server, whose count has to be this; return which generations have answered."""
    said = [ask(client).split() for client in clients]
    assert [int(each) for _, each in said] == [count] * len(clients)
    return [int(generation) for generation, _ in said]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_successor_that_fails_costs_only_what_it_had_taken(loop: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("faulty_service.py")
    with Service(script, loop=loop, directory=tmp_path) as service:
        first = service.wait_for_generation(1)
        address = ("127.0.0.1", service.port())
        clients = [socket.create_connection(address, PATIENCE_SECONDS) for _ in range(CLIENTS)]
        assert set(answers(clients, 1)) == {1}

        # Some clients leave, then half of the connections are refused.
        os.kill(first, signal.SIGHUP)
        second = service.wait_for_generation(2)
        service.wait_for("a batch has come")
        for client in clients[:LEAVING]:
            client.close()
        del clients[:LEAVING]
        (tmp_path / "go").touch()
        service.wait_for(rf"(?s)(only half of them.*){{{CLIENTS // BATCH}}}")
        generations = answers(clients, 2)
        assert set(generations) == {1, 2}
        wait_for_clients(first, generations.count(1))
        wait_for_clients(second, generations.count(2))
        for client, generation in zip(clients, generations, strict=True):
            if generation == 1:
                client.close()
        clients = [client for client, generation in zip(clients, generations, strict=True) if generation == 2]
        assert service.exit_status(first) == 0
        beside = others(second)

        # There is no room for all of them, and then there is.
        os.kill(second, signal.SIGHUP)
        third = service.wait_for_generation(3)
        service.wait_for("too many files are open there")
        generations = answers(clients, 3)
        assert set(generations) == {2, 3}
        (tmp_path / "room").touch()
        wait_for_clients(third, len(clients))
        assert service.exit_status(second) == 0
        assert set(answers(clients, 4)) == {3}
        wait_until(lambda: others(third) <= beside)

        # The successor dies with its second batch in its hands, and another one on its way.
        os.kill(third, signal.SIGHUP)
        service.wait_for(rf"transfer: {BATCH} connections have moved in .*, {len(clients) - BATCH} are left")
        wait_for_clients(third, len(clients) - BATCH)
        said = [ask(client) for client in clients]
        assert said.count(b"") == BATCH
        assert said.count(b"3 5\n") == len(clients) - BATCH
        for client in clients:
            client.close()
        assert service.exit_status(third) == 0
        while service.read_log():
            pass
    assert "Traceback" not in service.log
