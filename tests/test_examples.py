"""Every example is started, talked to, restarted twice and stopped, as its docstring tells the reader to do."""

from __future__ import annotations

import ctypes
import http.client
import os
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import pytest
import trustme

pytestmark = pytest.mark.main_python_only

PROJECT = Path(__file__).resolve().parent.parent
EXAMPLES = PROJECT / "examples"

# How long anything at all may take, seconds: three Pythons have to start on a machine that is busy with other tests.
TIMEOUT = 30

# An example with the loop it runs on. Which one is there none of them sees: one shows both.
STREAMS = [
    ("line_server", "asyncio"),
    ("line_server", "uvloop"),
    ("protocol_server", "asyncio"),
    ("unix_server", "uvloop"),
    ("tls_server", "asyncio"),
    ("admin_server", "uvloop"),
    ("anyio_server", "asyncio"),
    ("anyio_server", "trio"),
    ("trio_server", "trio"),
]
DATAGRAMS = [
    ("udp_server", "asyncio"),
    ("udp_server", "uvloop"),
    ("anyio_udp_server", "asyncio"),
    ("anyio_udp_server", "trio"),
]

# What the tests of ``ecdysis run``, and those of transfer, start.
ELSEWHERE = {"asgi_app", "websocket_echo", "websockets_server"}

PR_SET_CHILD_SUBREAPER = 36  # prctl(2)

# What a log holds where something went wrong. A stop that ends a restart which had not settled is reported as the end
# of that restart, and is what these tests do.
TROUBLE = re.compile(r"^(ERROR|CRITICAL|Traceback|Exception ).*", re.MULTILINE)


class Service:
    """An example that runs: all of its generations, and the log that they write together."""

    def __init__(self, script: Path, *arguments: str, loop: str, directory: Path) -> None:
        self.directory = directory
        paths = [str(PROJECT)]
        if loop == "asyncio":
            # As on a machine without uvloop: importlib finds no module where sys.modules says None.
            (directory / "sitecustomize.py").write_text('import sys\n\nsys.modules["uvloop"] = None\n')
            paths.append(str(directory))
        environment = {
            **os.environ,
            "PORT": "0",
            "ADMIN_PORT": "0",
            "SOCKET": "line.sock",
            "BACKEND": loop,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONWARNINGS": "error",
        }
        # Of other tests, as the systemd that several of them share.
        self._former_children = set(psutil.Process().children())
        self.process = subprocess.Popen(
            [sys.executable, str(script), *arguments], stderr=subprocess.PIPE, env=environment, cwd=directory
        )
        self.log = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Those of the test that has failed; one that has passed left none.
        children = set(psutil.Process().children()) - self._former_children
        processes = [*children, *(each for child in children for each in find_descendants(child))]
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=TIMEOUT)
        self.process.wait(TIMEOUT)
        while self.read_log():
            pass
        assert self.process.stderr is not None
        self.process.stderr.close()
        if error is not None:
            error.add_note(f"the log:\n{self.log}")

    def read_log(self) -> bool:
        """Wait for more of the log; say whether there is any, or every generation has ended."""
        assert self.process.stderr is not None
        readable, _, _ = select.select([self.process.stderr], [], [], TIMEOUT)
        assert readable, "the log went silent"
        text = os.read(self.process.stderr.fileno(), 65536).decode()
        self.log += text
        return bool(text)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Return the first match in the log, present or to come."""
        while (found := re.search(pattern, self.log)) is None:
            assert self.read_log(), f"all has ended without {pattern}"
        return found

    def wait_for_generation(self, number: int) -> int:
        """Wait until a generation accepts; return its pid."""
        return int(self.wait_for(rf"generation {number}, pid (\d+)[^]]*\] serving")[1])

    def exit_status(self, pid: int) -> int:
        """Wait for the end of a generation whose parent has ended."""
        if pid == self.process.pid:
            return self.process.wait(TIMEOUT)
        descriptor = os.pidfd_open(pid)
        try:
            assert select.select([descriptor], [], [], TIMEOUT)[0], f"{pid} goes on"
        finally:
            os.close(descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def require_clean_end(self) -> None:
        """Wait for the end of all generations, and for a log without trouble."""
        while self.read_log():
            pass
        trouble = TROUBLE.search(self.log)
        assert trouble is None, trouble

    def port(self, kind: str = "tcp", index: int = 0) -> int:
        """Find the port of the first socket that the first generation has bound, or of another one."""
        connections = psutil.Process(self.process.pid).net_connections(kind)
        bound = sorted(connections, key=lambda connection: connection.fd)
        return list(dict.fromkeys(connection.laddr.port for connection in bound))[index]


class Client:
    """A connection to a service of lines."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._file = sock.makefile("rwb")

    def ask(self, text: bytes) -> bytes:
        """Send a line and return the line that answers it."""
        self._file.write(text + b"\n")
        self._file.flush()
        return self._file.readline()

    def read_to_end(self) -> bytes:
        """Return everything until the service closes the connection, and close this side as well."""
        text = self._file.read()
        # A service of TLS waits for that: its goodbye has to be answered.
        self.close()
        return text

    def close(self) -> None:
        self._file.close()
        self._sock.close()


def find_descendants(process: psutil.Process) -> list[psutil.Process]:
    """Find the children of a process, and theirs, where it is still there."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(autouse=True)
def subreaper() -> Iterator[None]:
    """Make generations whose parent has left children of this process: it wants to know how they end."""
    libc = ctypes.CDLL(None, use_errno=True)
    for switch in (1, 0):
        assert libc.prctl(PR_SET_CHILD_SUBREAPER, switch, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())
        if switch:
            yield


def test_every_example_has_a_test() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        *(name for name, _ in (*STREAMS, *DATAGRAMS)),
        *ELSEWHERE,
        "moving_counter",
    }


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_is_read_at_a_glance(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 50


@pytest.mark.parametrize(("name", "loop"), STREAMS)
def test_streams(name: str, loop: str, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    arguments = (str(certificates.certificate), str(certificates.key)) if name == "tls_server" else ()
    with ExitStack() as stack:
        service = stack.enter_context(Service(EXAMPLES / f"{name}.py", *arguments, loop=loop, directory=tmp_path))
        first = service.wait_for_generation(1)
        assert (loop == "uvloop") == uses_uvloop(first)
        connect = connector(name, service, certificates)
        restart = restart_by_request(service) if name == "admin_server" else restart_by_signal

        early = stack.enter_context(connect())
        assert early.ask(b"one") == b"hello from generation 1: one\n"

        certificates.renew()
        restart(first)
        second = service.wait_for_generation(2)
        middle = stack.enter_context(connect())
        assert middle.ask(b"two") == b"hello from generation 2: two\n"
        assert early.ask(b"three") == b"hello from generation 1: three\n"

        # A restart of the new generation makes the one before final: the first generation drains, and ends.
        restart(second)
        service.wait_for(r"generation 1, pid \d+, restart \w+\] the restart is settled")
        assert early.ask(b"four") == b"bye from generation 1: four\n"
        assert early.read_to_end() == b""
        assert service.exit_status(first) == 0
        third = service.wait_for_generation(3)
        late, silent = stack.enter_context(connect()), stack.enter_context(connect())
        assert late.ask(b"five") == silent.ask(b"five") == b"hello from generation 3: five\n"

        os.kill(third, signal.SIGTERM)
        for number, pid, client in ((2, second, middle), (3, third, late)):
            service.wait_for(rf"generation {number}, pid {pid}(, restart \w+)?\] (draining|the restart is settled)")
            assert client.ask(b"six") == b"bye from generation %d: six\n" % number
            assert client.read_to_end() == b""
            if pid == second:
                assert service.exit_status(pid) == 0
        # A second signal makes the deadline now. Who is silent then gets at the most a goodbye, and no reset.
        os.kill(third, signal.SIGTERM)
        assert silent.read_to_end() == (b"bye from generation 3\n" if name == "unix_server" else b"")
        assert service.exit_status(third) == 0
        service.require_clean_end()
        assert not (tmp_path / "line.sock").exists()


@pytest.mark.parametrize(("name", "loop"), DATAGRAMS)
def test_datagrams(name: str, loop: str, tmp_path: Path) -> None:
    with (
        Service(EXAMPLES / f"{name}.py", loop=loop, directory=tmp_path) as service,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        first = service.wait_for_generation(1)
        assert (loop == "uvloop") == uses_uvloop(first)
        client.settimeout(TIMEOUT)
        client.connect(("127.0.0.1", service.port("udp")))

        def ask_until(number: int) -> None:
            """Send datagrams until a generation answers; each of them is answered, in turn, by whichever reads."""
            text, answer = 0, b""
            while answer != b"generation %d: %d" % (number, text):
                text += 1
                client.send(b"%d" % text)
                answer = client.recv(100)
                assert answer in (b"generation %d: %d" % (number - 1, text), b"generation %d: %d" % (number, text))

        ask_until(1)
        os.kill(first, signal.SIGHUP)
        ask_until(2)
        second = service.wait_for_generation(2)
        os.kill(second, signal.SIGHUP)
        ask_until(3)
        assert service.exit_status(first) == 0
        os.kill(service.wait_for_generation(3), signal.SIGTERM)
        assert service.exit_status(second) == 0
        service.require_clean_end()
        assert re.search(r"generation 3, pid \d+(, restart \w+)?\] this generation ends", service.log)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_connection_moves_with_its_number(loop: str, tmp_path: Path) -> None:
    with Service(EXAMPLES / "moving_counter.py", loop=loop, directory=tmp_path) as service:
        first = service.wait_for_generation(1)
        with closing(connect_tcp(service.port())) as client:
            assert client.ask(b"a") == b"1 from generation 1\n"
            os.kill(first, signal.SIGHUP)
            second = service.wait_for_generation(2)
            # The first generation has ended once nothing is left to it.
            assert service.exit_status(first) == 0
            assert client.ask(b"b") == b"2 from generation 2\n"
        os.kill(second, signal.SIGTERM)
        assert service.exit_status(second) == 0
        service.require_clean_end()


def test_the_program_of_the_first_page(tmp_path: Path) -> None:
    found = re.search(r"^```python\n(.*?)^```", (PROJECT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    script = tmp_path / "echo.py"
    log = "import logging\n\nlogging.basicConfig(level=logging.INFO)\n"
    script.write_text(log + found[1].replace('"127.0.0.1", 8000', '"127.0.0.1", 0'))
    with Service(script, loop="asyncio", directory=tmp_path) as service:
        first = service.wait_for_generation(1)
        port = service.port()
        with closing(connect_tcp(port)) as client:
            assert client.ask(b"one") == b"one\n"
            os.kill(first, signal.SIGHUP)
            second = service.wait_for_generation(2)
            assert client.ask(b"two") == b"two\n"
        with closing(connect_tcp(port)) as client:
            assert client.ask(b"three") == b"three\n"
        os.kill(second, signal.SIGTERM)
        assert service.exit_status(first) == 0
        assert service.exit_status(second) == 0
        service.require_clean_end()


def test_the_socket_of_a_server_of_tornado_is_handed_over(tmp_path: Path) -> None:
    with Service(PROJECT / "docs" / "snippets" / "tornado_server.py", loop="asyncio", directory=tmp_path) as service:
        first = service.wait_for_generation(1)
        port = service.port()
        assert request(port, "GET") == (200, f"process {first}")
        os.kill(first, signal.SIGHUP)
        second = service.wait_for_generation(2)
        # Tornado accepts by itself, so that both generations do until the restart is settled.
        while (answer := request(port, "GET")) != (200, f"process {second}"):
            assert answer == (200, f"process {first}")
        os.kill(second, signal.SIGTERM)
        assert service.exit_status(first) == 0
        assert service.exit_status(second) == 0


def test_admin_endpoint_tells_why_a_restart_failed(tmp_path: Path) -> None:
    script = Path(shutil.copy(EXAMPLES / "admin_server.py", tmp_path))
    works = script.read_text()
    with Service(script, loop="uvloop", directory=tmp_path) as service:
        first = service.wait_for_generation(1)
        port, admin_port = service.port(), service.port(index=1)
        assert request(admin_port, "GET")[0] == 405
        with closing(connect_tcp(port)) as client:
            script.write_text(f'raise LookupError("no such setting")\n{works}')
            status, answer = request(admin_port, "POST")
            assert status == 503
            assert "LookupError: no such setting" in answer
            assert client.ask(b"one") == b"hello from generation 1: one\n"
        script.write_text(works)
        status, answer = request(admin_port, "POST")
        assert status == 200
        assert "generation 2: serving" in answer
        second = service.wait_for_generation(2)
        with closing(connect_tcp(port)) as client:
            assert client.ask(b"two") == b"hello from generation 2: two\n"
            os.kill(second, signal.SIGTERM)
            assert service.exit_status(first) == 0
            service.wait_for(r"generation 2, pid \d+(, restart \w+)?\] draining")
            assert client.ask(b"three") == b"bye from generation 2: three\n"
            assert client.read_to_end() == b""
        assert service.exit_status(second) == 0


class Certificates:
    """A certificate where the TLS example finds it, and the authority that has signed it."""

    def __init__(self, directory: Path) -> None:
        self.certificate = directory / "certificate.pem"
        self.key = directory / "key.pem"
        self.renew()

    def renew(self) -> None:
        """Replace the certificate by that of another authority: who trusts only that one sees which is served."""
        self.authority = trustme.CA()
        issued = self.authority.issue_cert("127.0.0.1")
        issued.private_key_pem.write_to_path(str(self.key))
        issued.cert_chain_pems[0].write_to_path(str(self.certificate))


def connector(name: str, service: Service, certificates: Certificates) -> Callable[[], AbstractContextManager[Client]]:
    """Return what connects to an example."""
    if name == "unix_server":
        path = str(service.directory / "line.sock")
        inode = os.stat(path).st_ino

        def connect_unix() -> Client:
            assert os.stat(path).st_ino == inode
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(TIMEOUT)
            sock.connect(path)
            return Client(sock)

        return lambda: closing(connect_unix())
    port = service.port()
    if name == "tls_server":

        def connect_tls() -> Client:
            context = ssl.create_default_context()
            certificates.authority.configure_trust(context)
            sock = socket.create_connection(("127.0.0.1", port), TIMEOUT)
            return Client(context.wrap_socket(sock, server_hostname="127.0.0.1"))

        return lambda: closing(connect_tls())
    return lambda: closing(connect_tcp(port))


def connect_tcp(port: int) -> Client:
    """Connect to a port of this machine."""
    return Client(socket.create_connection(("127.0.0.1", port), TIMEOUT))


def restart_by_signal(pid: int) -> None:
    """Restart a service as from a shell."""
    os.kill(pid, signal.SIGHUP)


def restart_by_request(service: Service) -> Callable[[int], None]:
    """Return what restarts the admin example: its newest generation answers, whichever pid that is."""
    port = service.port(index=1)

    def restart(pid: int) -> None:
        status, answer = request(port, "POST")
        assert (status, "serving" in answer) == (200, True), answer

    return restart


def request(port: int, method: str) -> tuple[int, str]:
    """Make a request of HTTP; return status and body."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)) as connection:
        connection.request(method, "/")
        with connection.getresponse() as response:
            return response.status, response.read().decode()


def uses_uvloop(pid: int) -> bool:
    """Say whether a process has loaded uvloop."""
    return any("/uvloop/" in mapping.path for mapping in psutil.Process(pid).memory_maps())
