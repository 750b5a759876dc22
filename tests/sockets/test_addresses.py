"""Where a service listens: bound there as it was asked for, and with nobody else's path touched."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ecdysis_async._sockets.addresses import (
    MAX_UNIX_PATH,
    Descriptor,
    Internet,
    Unix,
    name_sockets,
    parse_address,
    resolve,
)
from ecdysis_async._sockets.entry import Kind

type_of = {Kind.UNIX: socket.SOCK_STREAM, Kind.SEQPACKET: socket.SOCK_SEQPACKET, Kind.UNIX_DATAGRAM: socket.SOCK_DGRAM}


@pytest.mark.parametrize(
    "host", ["localhost", "example.org", "b\u00fccher.example", "a" * 300, "1.2.3.4.5", "[::1]", "a b"]
)
def test_names_are_refused_with_a_remedy(host: str) -> None:
    with pytest.raises(ValueError, match=r"no numeric address.*resolve"):
        Internet(host, 0).bind()


@pytest.mark.parametrize("port", [-1, 65536])
def test_ports_are_checked(port: int) -> None:
    with pytest.raises(ValueError, match="no port"):
        Internet("127.0.0.1", port, is_datagram=True).bind()


@pytest.mark.parametrize(
    ("address", "type", "text", "is_single"),
    [
        (Internet("127.0.0.1", 0), socket.SOCK_STREAM, "127.0.0.1:0", False),
        (Internet("0:0::1", 0, is_datagram=True), socket.SOCK_DGRAM, "[::1]:0", False),
        (Internet(None, 80), None, "0.0.0.0:80", True),
        (Internet("127.1", 80, reuse_port=True), None, "127.0.0.1:80", False),
    ],
)
def test_a_port_is_bound_and_does_not_listen(
    address: Internet, type: socket.SocketKind | None, text: str, *, is_single: bool
) -> None:
    assert (address.text, address.is_single) == (text, is_single)
    if type is None:
        return
    with address.bind() as sock:
        assert (sock.type, sock.getsockname()[1] > 0) == (type, True)
        assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def test_a_path_is_absolute_and_an_abstract_address_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Unix("socket").text == str(tmp_path / "socket")
    name = f"{tmp_path.name}/{os.getpid()}"
    assert Unix(f"@{name}").text == Unix(f"\0{name}").text == f"@{name}"
    with Unix(f"@{name}", mode=0o600).bind() as sock:
        assert sock.getsockname() == f"\0{name}".encode()
    with pytest.raises(ValueError, match="too long"):
        _ = Unix("a" * (MAX_UNIX_PATH + 1)).text


@pytest.mark.parametrize("kind", type_of)
@pytest.mark.parametrize("mode", [0o600, 0o666, 0o770])
def test_the_mode_is_exact_whatever_the_umask(tmp_path: Path, kind: Kind, mode: int) -> None:
    path = tmp_path / "socket"
    before = os.umask(0o022)
    try:
        Unix(str(path), kind, mode).bind().close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_path_is_at_no_time_more_open_than_it_shall_be(tmp_path: Path) -> None:
    # In a process of its own, because an audit hook stays. It looks right after the bind, before the mode is set.
    code = (
        "import os, sys\n"
        "from ecdysis_async._sockets.addresses import Unix\n"
        "from ecdysis_async._sockets.entry import Kind\n"
        "path = sys.argv[1]\n"
        "def look(event, arguments):\n"
        "    if event == 'os.chmod' and arguments[0] == path:\n"
        "        print(oct(os.stat(path).st_mode))\n"
        "sys.addaudithook(look)\n"
        "os.umask(0)\n"
        "Unix(path, Kind.UNIX_DATAGRAM, 0o600).bind()\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "socket")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout == f"{stat.S_IFSOCK | 0o600:#o}\n"


@pytest.mark.parametrize("kind", type_of)
@pytest.mark.parametrize("occupant_type", type_of.values())
def test_a_path_that_a_killed_process_left_is_replaced(
    tmp_path: Path, kind: Kind, occupant_type: socket.SocketKind
) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, occupant_type) as occupant:
        occupant.bind(str(path))
        # Occupied, whether or not it listens: it may be a successor that has not got its commit yet.
        for _ in range(2):
            with pytest.raises(OSError, match="in use") as raised:
                Unix(str(path), kind).bind()
            assert raised.value.errno == errno.EADDRINUSE
            if occupant_type is not socket.SOCK_DGRAM:
                occupant.listen()
        if occupant_type is not socket.SOCK_DGRAM:
            # And nobody has been troubled by a connection that was only a question.
            occupant.setblocking(False)
            with pytest.raises(BlockingIOError):
                occupant.accept()
    with Unix(str(path), kind).bind() as sock:
        assert sock.getsockname() == str(path)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", Internet("127.0.0.1", 80)),
        ("localhost:0", Internet("localhost", 0)),
        (":80", Internet("", 80)),
        ("[::1]:80", Internet("::1", 80)),
        ("unix:/run/app.sock", Unix("/run/app.sock")),
        ("unix:///run/app.sock", Unix("/run/app.sock")),
        ("unix:app.sock", Unix("app.sock")),
        ("unix:@app", Unix("@app")),
        ("fd://web", Descriptor("web")),
        ("fd://3", Descriptor(3)),
    ],
)
def test_addresses(text: str, address: object) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text", ["", "8000", "localhost", "::1:80", "1.2.3.4:http", "a:99999", "unix:", "fd://", "fd://2"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"HOST:PORT|0 and 65535|/run/app.sock|fd://3"):
        parse_address(text)


def test_what_people_write_is_resolved_and_named_as_the_registry_names_it() -> None:
    local = parse_address("[::1]:80")
    assert resolve(local) == [Internet("::1", 80)]
    assert name_sockets(local) == ["tcp:[::1]:80"]
    assert resolve(Internet("", 80)) == [Internet("0.0.0.0", 80)]
    assert name_sockets(Unix("/run/app.sock")) == ["unix:/run/app.sock"]
    assert name_sockets(Descriptor(3)) == ["fd://3"]
    with pytest.raises(OSError, match=r"cannot listen on nobody\.invalid:80"):
        resolve(Internet("nobody.invalid", 80))
