"""HTTP/2: a connection is told of the restart by a GOAWAY, and whatever it has asked is answered."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections import Counter
from pathlib import Path

import pytest
import trustme
from hpack import Decoder, Encoder
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, PingFrame, SettingsFrame

from tests.scenarios.servers.clients import HOST
from tests.scenarios.servers.harness import PATIENCE_SECONDS, find_blemishes, running
from tests.scenarios.servers.streams import Counts, StreamClient

pytestmark = pytest.mark.main_python_only

RESTARTS = 3
CLIENTS = 6
PAUSE_SECONDS = 0.1
SETTINGS = {"probation": 0.05, "drain_timeout": 5}
HEADER_BYTES = 9


class Client:
    """Asks one thing after the other on one connection, and takes another one when it is told to.

    Not of the package h2, for which a GOAWAY is the end: RFC 9113, 6.8, lets requests before it be answered behind it.
    """

    def __init__(self, port: int, answers: Counter[str], failures: Counter[str]) -> None:
        self.goodbyes = 0
        self.heard: set[str] = set()
        self._port = port
        self._answers = answers
        self._failures = failures

    async def run(self, ended: asyncio.Event) -> None:
        while not ended.is_set():
            reader, writer = await asyncio.open_connection(HOST, self._port)
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await self._talk(reader, writer, ended)
            except (OSError, EOFError, AssertionError) as error:
                self._failures[repr(error)] += 1
            finally:
                writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ended: asyncio.Event) -> None:
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize())
        encoder, decoder = Encoder(), Decoder()
        is_dismissed = False
        stream = -1
        frames = asyncio.create_task(read_frame(reader))
        try:
            while not is_dismissed and not ended.is_set():
                stream += 2
                seconds = random.choice(["0", "0", "0.3"])
                path = f"/slow/{seconds}/{stream}"
                headers = [(":method", "GET"), (":scheme", "http"), (":path", path), (":authority", "localhost")]
                request = HeadersFrame(stream, encoder.encode(headers), flags=["END_HEADERS", "END_STREAM"])
                writer.write(request.serialize())
                body = b""
                while True:
                    frame = await frames
                    assert frame is not None, f"closed without an answer to stream {stream}, dismissed: {is_dismissed}"
                    frames = asyncio.create_task(read_frame(reader))
                    match frame:
                        case SettingsFrame() if "ACK" not in frame.flags:
                            writer.write(SettingsFrame(0, flags=["ACK"]).serialize())
                        case PingFrame() if "ACK" not in frame.flags:
                            writer.write(PingFrame(0, frame.opaque_data, flags=["ACK"]).serialize())
                        case GoAwayFrame():
                            # The second one, which names the last stream, may come before the answer as well.
                            assert frame.error_code == 0
                            assert frame.last_stream_id >= stream
                            self.goodbyes += not is_dismissed
                            is_dismissed = True
                        case HeadersFrame():
                            assert dict(decoder.decode(frame.data, raw=True))[b":status"] == b"200"
                        case DataFrame():
                            body += frame.data
                    if frame.stream_id == stream and "END_STREAM" in frame.flags:
                        break
                generation, _, text = body.decode().partition(" ")
                assert text == str(stream)
                self._answers[generation] += 1
                self.heard.add(generation)
                # The goodbye may come meanwhile, as it may while the next request is on its way.
                await asyncio.wait([frames], timeout=random.uniform(0, PAUSE_SECONDS))
                if frames.done():
                    frame = frames.result()
                    assert isinstance(frame, GoAwayFrame), frame
                    self.goodbyes += 1
                    return
        finally:
            frames.cancel()


async def read_frame(reader: asyncio.StreamReader) -> Frame | None:
    try:
        header = await reader.readexactly(HEADER_BYTES)
    except asyncio.IncompleteReadError:
        return None
    frame, length = Frame.parse_frame_header(memoryview(header))
    frame.parse_body(memoryview(await reader.readexactly(length)))
    return frame


# Of each kind of clients.
STREAM_CLIENTS = 3
# A client that asks all the time is told after half of the drain; the other half is long enough for a machine with
# other work.
STREAM_SETTINGS = {"probation": 0.05, "drain_timeout": 12}

CASES = [
    ("hypercorn", "asyncio", "tls"),
    ("hypercorn", "uvloop", "clear"),
    ("hypercorn", "trio", "clear"),
    ("hypercorn", "trio", "tls"),
    ("uvicorn-http2", "asyncio", "clear"),
    ("uvicorn-http2", "uvloop", "tls"),
    ("hypercorn", "asyncio", "main"),
    ("hypercorn", "trio", "main"),
    ("uvicorn-http2", "uvloop", "main"),
]


@pytest.mark.parametrize(("server", "loop", "kind"), CASES)
def test_every_stream_is_answered_or_may_be_asked_again(server: str, loop: str, kind: str, tmp_path: Path) -> None:
    counts = asyncio.run(restart_among_streams(server, loop, kind, tmp_path))
    assert counts.lost == []
    assert {"1", "2", "3"} <= set(counts.answers)
    assert counts.goodbyes >= 4 * STREAM_CLIENTS
    # Those who do not heed the first GOAWAY are refused what comes behind the second one.
    assert counts.refused >= 1


async def restart_among_streams(server: str, loop: str, kind: str, directory: Path) -> Counts:
    options, tls = make_tls(directory) if kind == "tls" else ([], None)
    counts = Counts()
    ended = asyncio.Event()
    is_main = kind == "main"
    async with (
        running(server, loop, directory, settings=STREAM_SETTINGS, is_main=is_main, options=options) as service,
        asyncio.TaskGroup() as task_group,
    ):
        clients = [
            StreamClient(service.port, counts, tls, is_deaf=number % 2 == 1) for number in range(2 * STREAM_CLIENTS)
        ]
        for client in clients:
            task_group.create_task(client.run(ended))
        for number in range(2):
            # Each of them is there, to be told to leave.
            while not all(str(number + 1) in client.heard for client in clients):  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.01)
            report = await service.restart()
            assert report.get("outcome") == "settled", report
            await service.wait_for_ends(number + 1)
        while not counts.answers["3"]:  # noqa: ASYNC110 - an answer has no event
            await asyncio.sleep(0.01)
        ended.set()
    reports = [service.reports[pid] for pid in service.pids[:-1]]
    assert [report and report.drain.cut for report in reports] == [0, 0]
    assert find_blemishes(directory) == []
    return counts


def make_tls(directory: Path) -> tuple[list[str], ssl.SSLContext]:
    """Return options of ``ecdysis run`` that serve TLS, and what a client of HTTP/2 connects with."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    path = directory / "certificate.pem"
    certificate.private_key_and_cert_chain_pem.write_to_path(path)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    context.set_alpn_protocols(["h2"])
    return ["--certfile", str(path), "--keyfile", str(path)], context


@pytest.mark.parametrize("loop", ["uvloop", "trio"])
def test_a_limit_of_requests_loses_no_stream(loop: str, tmp_path: Path) -> None:
    async def test() -> Counts:
        counts, ended = Counts(), asyncio.Event()
        options = ["--server-option", "keep_alive_max_requests=20"]
        async with (
            running("hypercorn", loop, tmp_path, settings={"drain_timeout": 10}, options=options) as service,
            asyncio.TaskGroup() as task_group,
        ):
            for _ in range(STREAM_CLIENTS):
                task_group.create_task(StreamClient(service.port, counts).run(ended))
            while counts.goodbyes < 4 * STREAM_CLIENTS:  # noqa: ASYNC110 - a frame has no event
                await asyncio.sleep(0.01)
            ended.set()
        return counts

    assert asyncio.run(test()).lost == []
    assert find_blemishes(tmp_path) == []


@pytest.mark.parametrize("loop", ["uvloop", "trio"])
def test_what_is_sent_to_an_answered_stream_disturbs_no_other(loop: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with running("hypercorn", loop, tmp_path, settings={"drain_timeout": 10}) as service:
            reader, writer = await asyncio.open_connection(HOST, service.port)
            encoder = Encoder()
            asked = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize()
            for stream, path, flags in ((1, "/slow/0.5/x", ["END_STREAM"]), (3, "/echo/y", [])):
                headers = [(":method", "PUT"), (":scheme", "http"), (":path", path), (":authority", "localhost")]
                asked += HeadersFrame(stream, encoder.encode(headers), flags=["END_HEADERS", *flags]).serialize()
            # In one piece, so that the second request is there before the first one is answered.
            writer.write(asked)
            answered: list[int] = []
            while len(answered) < 2:
                frame = await asyncio.wait_for(read_frame(reader), PATIENCE_SECONDS)
                assert frame is not None, answered
                if "END_STREAM" in frame.flags:
                    answered.append(frame.stream_id)
                    if frame.stream_id == 3:
                        writer.write(DataFrame(3, b"late", flags=["END_STREAM"]).serialize())
            assert answered == [3, 1]
            writer.close()

    asyncio.run(test())
    assert find_blemishes(tmp_path) == []


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_a_client_that_leaves_in_the_middle_of_a_request_holds_nothing_up(loop: str, tmp_path: Path) -> None:
    async def test() -> None:
        # Far longer than the test has patience.
        async with running("hypercorn", loop, tmp_path, settings={"drain_timeout": 600}) as service:
            reader, writer = await asyncio.open_connection(HOST, service.port)
            headers = [(":method", "GET"), (":scheme", "http"), (":path", "/slow/0.3/x"), (":authority", "localhost")]
            writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize())
            request = HeadersFrame(1, Encoder().encode(headers), flags=["END_HEADERS", "END_STREAM"])
            writer.write(request.serialize() + PingFrame(0, bytes(8)).serialize())
            # The request before it has begun.
            while not isinstance(frame := await read_frame(reader), PingFrame):
                assert frame is not None
            writer.close()

    asyncio.run(test())
    assert find_blemishes(tmp_path) == []


@pytest.mark.timeout(600)  # a few seconds on an idle machine
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_restarts_lose_no_request_of_http_2(loop: str, tmp_path: Path) -> None:
    asyncio.run(restart(loop, tmp_path))


async def restart(loop: str, directory: Path) -> None:
    answers: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    ended = asyncio.Event()
    async with running("hypercorn", loop, directory, settings=SETTINGS) as service:
        clients = [Client(service.port, answers, failures) for _ in range(CLIENTS)]
        async with asyncio.TaskGroup() as task_group:
            for client in clients:
                task_group.create_task(client.run(ended))
            for number in range(RESTARTS):
                await service.wait_for_ends(number - 2)
                report = await service.restart()
                assert report.get("outcome") == "settled", report
                await service.wait_for_generations(number + 2)
                latest = str(service.generations[-1])
                while not all(latest in client.heard for client in clients):  # noqa: ASYNC110 - it has no event
                    await asyncio.sleep(0.01)
            ended.set()
    assert failures == Counter()
    assert all(client.goodbyes >= 1 for client in clients)
    assert sum(client.goodbyes for client in clients) >= CLIENTS * (RESTARTS - 1)
    reports = [service.reports[pid] for pid in service.pids[:-1]]
    assert [report and report.drain.cut for report in reports] == [0] * RESTARTS
    assert find_blemishes(directory) == []
