"""What is fuzzed: each target takes bytes, and raises where the product does something that is not documented.

A target runs for millions of inputs in one process, so whatever it leaves (a descriptor, memory) is seen at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import socket
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import click
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame, Opcode

from ecdysis_async._config.foreign import translate
from ecdysis_async._config.gather import gather, read_variables
from ecdysis_async._config.options import OPTIONS, OptionError, Options
from ecdysis_async._connections.parcel import Answer, Batch, MalformedMessage, Refused, Release, TransferRecord
from ecdysis_async._connections.receiver import Receiver
from ecdysis_async._connections.sender import socketpair
from ecdysis_async._explaining.records import read
from ecdysis_async._handoff.preflight import compare, describe_release
from ecdysis_async._handoff.protocol import (
    PredecessorEvent,
    PredecessorState,
    SuccessorEvent,
    SuccessorState,
    choose_version,
    predecessor_event,
    step_predecessor,
    step_successor,
    successor_event,
)
from ecdysis_async._ipc.channel import HEADER, MAGIC, FrameDecoder, encode
from ecdysis_async._management.changes import Changes
from ecdysis_async._management.control_connection import ClientGone, ControlConnection
from ecdysis_async._management.control_server import ControlServer
from ecdysis_async._management.controlled import ControlHandlers
from ecdysis_async._management.systemd import find_systemd
from ecdysis_async._sockets.addresses import parse_address
from ecdysis_async._system.claims import ANONYMOUS, FIRST_DESCRIPTOR, MARKER, claim_activation, claim_socket
from ecdysis_async._system.descriptors import send_with_descriptors
from ecdysis_async._system.history import SUFFIX, VERSION, Note
from ecdysis_async.cli.run import run as run_command
from ecdysis_async.errors import ChannelError, GarbledFrame, RestartInProgress, UnknownMessage, VersionMismatch
from ecdysis_async.report import Outcome, Phase, RestartReport, read_drain
from ecdysis_async.servers._protocols.frames import FrameFollower
from ecdysis_async.servers._protocols.websocket import WebSocketState, WindowFollower
from tests.fuzzing.reader import Reader

__all__ = ["TARGETS", "Target"]

Target = Callable[[bytes], None]

CONTROL_COMMANDS = ("status", "restart", "verdict", "stop", "check", "compare", "upgrade", "takeover", "reopen-logs")
CONTROL_WORDS = ("command", *CONTROL_COMMANDS, "until", "serving", "drained", "by", "id", "release", "anchor")

# How many bytes a fuzzer makes a WebSocket's message of at most.
MESSAGE_BYTES = 200

READ_BYTES = 65536

# Which words an option's value is made of, besides any.
OPTION_WORDS = ("main:app", "127.0.0.1:80", "off", "on", "10", "1.5", "[::1]:0", "unix:/a", "fd://3", "600", "/")


@contextlib.contextmanager
def frames() -> Iterator[Target]:
    """The handoff's channel: bytes and descriptors, in any pieces, become frames or a ``ChannelError``."""
    spare = os.eventfd(0)

    def attempt(data: bytes, descriptors: list[int], pieces: list[bytes]) -> list[Any] | None:
        decoder, found = FrameDecoder(), []
        try:
            for index, piece in enumerate(pieces):
                for frame in decoder.feed(piece, descriptors if index == 0 else ()):
                    frame.close()
                    found.append((frame.type, repr(frame.body)))
            decoder.end()
        except ChannelError:
            assert not decoder.holds_descriptors
            return None
        return found

    def run(data: bytes) -> None:
        reader = Reader(data)
        stream = b""
        for _ in range(reader.number(4)):
            match reader.number(4):
                case 0:
                    stream += reader.piece()
                case 1:
                    payload = reader.json(("type", "hello", "ready"), type="serving", opened_at=1.5)
                    stream += HEADER.pack(MAGIC, len(payload) + reader.number(3) // 2, reader.number(3))
                    stream += payload
                case _:
                    stream += encode(reader.text(), {"pid": reader.number()}, reader.number(3))
        count = reader.number(4)
        whole = attempt(data, [os.dup(spare) for _ in range(count)], [stream])
        cut = attempt(data, [os.dup(spare) for _ in range(count)], reader.pieces(stream))
        # Descriptors come with the first piece: what a piece may have of them depends on where it ends.
        assert count or whole == cut, (whole, cut)

    try:
        yield run
    finally:
        os.close(spare)


@contextlib.contextmanager
def handoff() -> Iterator[Target]:
    """Messages of either side, in any order, with any body: each leads to a state, or is refused by its own error."""
    report = RestartReport("id", 2, 1, phases=dict.fromkeys(Phase, 1.0), outcome=Outcome.SETTLED).to_json()
    words = (*report, *report["drain"], *(phase.value for phase in Phase), *(each.value for each in Outcome))

    def run(data: bytes) -> None:
        reader = Reader(data)
        predecessor, successor = PredecessorState.SPAWNING, SuccessorState.GREETING
        while not reader.is_over:
            match reader.number(6):
                case 0:
                    predecessor, _ = step_predecessor(predecessor, reader.choose(list(PredecessorEvent)))
                case 1:
                    successor, _ = step_successor(successor, reader.choose(list(SuccessorEvent)))
                case 2:
                    with contextlib.suppress(UnknownMessage):
                        predecessor, _ = step_predecessor(predecessor, predecessor_event(reader.text()))
                case 3:
                    with contextlib.suppress(UnknownMessage):
                        successor, _ = step_successor(successor, successor_event(reader.text()))
                case 4:
                    with contextlib.suppress(GarbledFrame, VersionMismatch):
                        choose_version({"versions": reader.value(("versions",))})
                case _:
                    with contextlib.suppress(ValueError, RecursionError):
                        body = json.loads(reader.json(words, **report))
                        with contextlib.suppress(AttributeError, KeyError, OverflowError, TypeError, ValueError):
                            str(RestartReport.from_json(body))
                        with contextlib.suppress(AttributeError, KeyError, OverflowError, TypeError, ValueError):
                            read_drain(body["drain"])

    yield run


@contextlib.contextmanager
def transfer() -> Iterator[Target]:
    """The texts of a transfer: what one side cannot read is a ``MalformedMessage``, or ``Refused``."""
    record = TransferRecord("tcp:127.0.0.1:80", 1.5, Release({"a": 1}, b"GET", "h1")).to_json()

    def run(data: bytes) -> None:
        reader = Reader(data)
        match reader.number(4):
            case 0:
                with contextlib.suppress(MalformedMessage):
                    batch = Batch.read(reader.json(("batch", "connections"), batch=1, connections=[record]))
                    for fields in batch.connections:
                        with contextlib.suppress(MalformedMessage):
                            read_again(TransferRecord.from_json(fields))
            case 1:
                with contextlib.suppress(MalformedMessage):
                    message = reader.json(("batch", "taken"), batch=1, taken=[0], later=[1], reasons=["no room"])
                    Answer.read(Answer.read(message).write())
            case 2:
                fields = list(record)
                fields[reader.number(len(fields))] = reader.value(("h1", "", "websocket"))
                with contextlib.suppress(MalformedMessage):
                    read_again(TransferRecord.from_json(fields))
            case _:
                state: list[Any] = ["GET / HTTP/1.1\r\n\r\n", [["permessage-deflate"], []], "", None]
                state[reader.number(len(state))] = reader.value(("", "YQ=="))
                with contextlib.suppress(Refused):
                    WebSocketState.unpack(Release(state))

    def read_again(found: TransferRecord) -> None:
        # Infinity is no JSON, and the sender's own encoder is what decides of that.
        assert repr(TransferRecord.from_json(found.to_json())) == repr(found)

    yield run


@contextlib.contextmanager
def receiver() -> Iterator[Target]:
    """A receiver of connections: whatever messages come, with whatever descriptors, it answers, or keeps away."""
    spare = os.eventfd(0)
    record = TransferRecord("nobody", 1.5, Release(None, b"", "")).to_json()
    log = logging.getLogger("ecdysis_async.fuzzing")
    log.disabled = True
    loop = asyncio.new_event_loop()

    def run(data: bytes) -> None:
        reader = Reader(data)
        ours, theirs = socketpair()
        with ours:
            for _ in range(reader.number(4)):
                count = reader.number(3)
                connections = [record] * count if reader.number(2) else reader.value(("nobody",))
                message = reader.json(("batch", "connections"), batch=reader.number(), connections=connections)
                if message:
                    send_with_descriptors(ours, message, [spare] * count)
            ours.shutdown(socket.SHUT_WR)
            loop.run_until_complete(Receiver(theirs, lambda name: None, log).run())

    try:
        yield run
    finally:
        loop.close()
        os.close(spare)
        log.disabled = False


@contextlib.contextmanager
def websocket() -> Iterator[Target]:
    """The states of a WebSocket: where its messages end, in whatever pieces it comes, and its compression beyond."""

    def run(data: bytes) -> None:
        reader = Reader(data)
        if reader.number(2):
            follow_any(reader)
        else:
            move(reader)

    def follow_any(reader: Reader) -> None:
        stream = reader.piece()
        whole, cut = FrameFollower(), FrameFollower()
        whole.feed(stream)
        for piece in reader.pieces(stream):
            cut.feed(piece)
        assert vars(whole) == vars(cut)

    def move(reader: Reader) -> None:
        """Let a compressed WebSocket move after each message, and go on reading."""
        bits = 9 + reader.number(7)
        compressor = zlib.compressobj(wbits=-bits)
        follower, extension = WindowFollower(), PerMessageDeflate(False, False, bits, bits)
        follower.follow([extension])
        for _ in range(1 + reader.number(4)):
            text = reader.take(reader.number(MESSAGE_BYTES)) * (1 + reader.number(8))
            packed = (compressor.compress(text) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]
            # The bit that says so is none of the follower's business.
            for piece in reader.pieces(Frame(Opcode.BINARY, packed).serialize(mask=True)):
                follower.feed(piece)
            assert follower.is_between_messages
            assert bytes(extension.decode(Frame(Opcode.BINARY, packed, rsv1=True)).data) == text
            if reader.number(2):
                successor, extension = WindowFollower(), PerMessageDeflate(False, False, bits, bits)
                successor.restore([extension], follower.window)
                follower = successor

    yield run


@contextlib.contextmanager
def control() -> Iterator[Target]:
    """The control socket: whatever a client says is answered by lines of JSON, and nothing is begun by what is none."""
    loop = asyncio.new_event_loop()
    environment = {"HOME": "/"}

    def refuse(*arguments: object) -> Any:
        raise RestartInProgress("another one is in progress")

    async def refuse_later(*arguments: object) -> Any:
        refuse()

    async def reopen_logs() -> int:
        return 0

    # A service that can begin nothing: what a request leads to there is the business of other tests.
    handlers = ControlHandlers(
        status=dict,
        waiting_for=lambda: None,
        begin_restart=refuse,
        find_report=lambda id: None,
        stop=lambda: None,
        changes=Changes(),
        reopen_logs=reopen_logs,
        check=refuse_later,
        compare=lambda release: compare(release, (), environment, {}),
        begin_takeover=refuse,
    )
    release = describe_release(["tcp:127.0.0.1:80"], environment)
    server = ControlServer("/nowhere/control", None, handlers)  # type: ignore[arg-type] # it opens nothing
    server._ending.set()

    def run(data: bytes) -> None:
        reader = Reader(data)
        shape = {"command": reader.choose(CONTROL_COMMANDS), "until": "settled", "by": "a deploy", "release": release}
        if reader.number(2):
            shape["release"] = {**release, reader.choose(tuple(release)): reader.value(tuple(release))}
        request = reader.json(CONTROL_WORDS, **shape)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            theirs.setblocking(False)
            ours.send(request + reader.choose((b"\n", b"", b"\nmore")))
            ours.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ClientGone):
                loop.run_until_complete(server._answer(ControlConnection(theirs)))
            theirs.close()
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := ours.recv(READ_BYTES):
                    answer += piece
        assert not answer or answer.endswith(b"\n")
        for line in answer.splitlines():
            assert isinstance(json.loads(line)["event"], str)
        assert answer or not request

    try:
        yield run
    finally:
        loop.close()


@contextlib.contextmanager
def systemd() -> Iterator[Target]:
    """The variables of systemd, and those by which sockets reach a process: none breaks a start, or takes a socket."""
    keys = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", MARKER)
    before = {key: os.environ.pop(key, None) for key in keys}
    # What is claimed is not inherited any more, and here everything may be.
    inherited = find_inherited()

    def run(data: bytes) -> None:
        reader = Reader(data)
        for key in keys:
            words = ("", str(os.getpid()), "0", "1", "@a", "/a", "a:b", "9" * 5000, "2147483648", "3:0:0", "\u0663")
            value = reader.choose(words) if reader.number(2) else reader.text()
            # No environment has such a value.
            os.environ[key] = value.replace("\0", "")
        if reader.number(4):
            os.environ["LISTEN_PID"] = str(os.getpid())
        # Whatever is open here is another one's.
        names = os.environ["LISTEN_FDNAMES"].split(":")
        for descriptor, name in claim_activation().items():
            assert descriptor >= FIRST_DESCRIPTOR
            assert name in {*names, ANONYMOUS}
        # A device and an inode of 0 are no socket's.
        if os.environ[MARKER].count(":") != 2 or os.environ[MARKER].endswith(":0"):
            assert claim_socket(MARKER) is None
        with contextlib.suppress(ValueError):
            found = find_systemd(reader.choose((None, True, False)))
            assert found.watchdog is None or found.watchdog > 0
            found.close()

    try:
        yield run
    finally:
        for key in keys:
            os.environ.pop(key, None)
        os.environ.update({key: value for key, value in before.items() if value is not None})
        for descriptor in inherited:
            with contextlib.suppress(OSError):
                os.set_inheritable(descriptor, True)


def find_inherited() -> list[int]:
    """Return the descriptors of this process that its children would get."""
    found = []
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        # That of the directory itself is closed by now.
        with contextlib.suppress(OSError):
            if os.get_inheritable(descriptor):
                found.append(descriptor)
    return found


@contextlib.contextmanager
def configuration() -> Iterator[Target]:
    """Configuration files, variables and what the command line says: options, or an ``OptionError``."""
    names = [option.key for option in OPTIONS]
    variables = [option.all_variables[0] for option in OPTIONS if option.all_variables]
    with tempfile.TemporaryDirectory(prefix="ecdysis-fuzz-") as directory:
        path = os.path.join(directory, "ecdysis.toml")

        def run(data: bytes) -> None:
            reader = Reader(data)
            with open(path, "wb") as file:
                file.write(make_toml(reader))
            environment = {
                reader.choose(variables): reader.choose(OPTION_WORDS) if reader.number(2) else reader.text()
                for _ in range(reader.number(3))
            }
            with contextlib.suppress(OptionError):
                options = gather({"config": path, "target": "main:app"}, {**environment})
                assert Options.restore(options.values) == options

        def make_toml(reader: Reader) -> bytes:
            if not reader.number(8):
                return reader.rest()
            if not reader.number(16):
                return b"bind = " + b"[" * 5000
            lines = [
                f"{reader.choose(names)} = {write(reader.value(OPTION_WORDS, 2))}" for _ in range(reader.number(5))
            ]
            return "\n".join(lines).encode("utf-8", "replace")

        yield run


def write(value: Any) -> str:
    """Write what JSON can hold as TOML, which is JSON but for tables and for what there is none of."""
    match value:
        case dict():
            return "{" + ", ".join(f"{json.dumps(key)} = {write(each)}" for key, each in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(write, value)) + "]"
        case float():
            return repr(value)
        case None:
            return "null"
    return json.dumps(value)


@contextlib.contextmanager
def env_file() -> Iterator[Target]:
    """Env files: variables, or an ``OptionError``."""
    with tempfile.TemporaryDirectory(prefix="ecdysis-fuzz-") as directory:
        path = os.path.join(directory, "env")

        def run(data: bytes) -> None:
            reader = Reader(data)
            with open(path, "wb") as file:
                file.writelines(
                    reader.piece() + reader.choose((b"=", b"='", b'="', b"\n", b"\r\n", b"# ", b"export ", b"\\"))
                    for _ in range(reader.number(6))
                )
            with contextlib.suppress(OptionError):
                assert all(isinstance(each, str) for pair in read_variables(path).items() for each in pair)

        yield run


@contextlib.contextmanager
def options() -> Iterator[Target]:
    """The command line of `ecdysis run`: options, an error of usage, or an ``OptionError``."""
    flags = [flag for parameter in run_command.params for flag in (*parameter.opts, *parameter.secondary_opts)]

    def run(data: bytes) -> None:
        reader = Reader(data)
        arguments = ["main:app"]
        for _ in range(reader.number(5)):
            arguments.append(reader.choose(flags))
            if reader.number(4):
                arguments.append(reader.choose(OPTION_WORDS) if reader.number(3) else reader.text())
        with contextlib.suppress(click.UsageError, click.exceptions.Exit, OptionError), hush():
            given = run_command.make_context("run", arguments).params
            gather(translate(given), {})

    @contextlib.contextmanager
    def hush() -> Iterator[None]:
        with contextlib.redirect_stdout(io.StringIO()):
            yield

    yield run


@contextlib.contextmanager
def addresses() -> Iterator[Target]:
    """Addresses: read and written they are the same, or a ``ValueError``."""

    def run(data: bytes) -> None:
        reader = Reader(data)
        text = "".join(
            reader.choose((*OPTION_WORDS, ":", "[", "]", "unix:", "fd://", "*", "\u0663")) + reader.text()
            for _ in range(reader.number(4))
        )
        with contextlib.suppress(ValueError):
            address = parse_address(text)
            # A path that begins with more slashes than it needs is read with fewer.
            assert parse_address(str(address)) == address or "////" in text

    yield run


@contextlib.contextmanager
def history() -> Iterator[Target]:
    """What processes have written down for `ecdysis explain`: lines that cannot be read are left out."""
    words = ("v", "at", "clock", "pid", "kind", *(note.value for note in Note))
    with tempfile.TemporaryDirectory(prefix="ecdysis-fuzz-") as directory:
        path = os.path.join(directory, "control")

        def run(data: bytes) -> None:
            reader = Reader(data)
            lines = []
            for _ in range(reader.number(6)):
                kind = reader.choose(tuple(Note)).value
                lines.append(reader.json(words, v=VERSION, at=1.5e9, clock=1.5, pid=7, kind=kind, restart="id"))
            with open(path + SUFFIX, "wb") as file:
                file.write(b"\n".join(lines))
            for record in read(path):
                record.seconds("at"), record.number("pid"), record.text("restart")

        yield run


TARGETS: dict[str, Callable[[], contextlib.AbstractContextManager[Target]]] = {
    each.__name__: each
    for each in (
        frames,
        handoff,
        transfer,
        receiver,
        websocket,
        control,
        systemd,
        configuration,
        env_file,
        options,
        addresses,
        history,
    )
}
"""Each is a context that yields what takes an input."""
