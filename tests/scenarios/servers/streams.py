"""Clients of HTTP/2 that know of each stream what became of it: answered, to be asked again elsewhere, or lost."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections import Counter
from dataclasses import dataclass, field

from hpack import Decoder, Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from tests.scenarios.servers.clients import HOST

PATIENCE_SECONDS = 60.0

HEADER_BYTES = 9
READ_BYTES = 2**20
WINDOW_BYTES = 2**30
REFUSED_STREAM = 7
ANY_STREAM = 2**31 - 1

# What a client asks for, and how many streams it has open at a time.
SECONDS = ("0", "0", "0.01", "0.05", "0.3")
AT_ONCE = 4


@dataclass
class Counts:
    """What all clients have seen.

    Attributes:
        answers: right ones, by generation.
        goodbyes: connections that were told to open no more streams.
        refused: streams that may be asked again elsewhere: above the last of a GOAWAY, or reset with REFUSED_STREAM.
        lost: all others without an answer, and why: there must be none.
    """

    answers: Counter[str] = field(default_factory=Counter)
    goodbyes: int = 0
    refused: int = 0
    lost: list[str] = field(default_factory=list)


class StreamClient:
    """Keeps some streams open on one connection after the other, until told to end.

    Attributes:
        heard: the generations that have answered this client.

    Args:
        port: where the service is.
        counts: for all that it sees.
        tls: to connect with; None is HTTP/2 in clear, with prior knowledge.
        is_deaf: whether it goes on to open streams after a first GOAWAY, until a second names the last, and one more
            behind it.
    """

    def __init__(self, port: int, counts: Counts, tls: ssl.SSLContext | None = None, *, is_deaf: bool = False) -> None:
        self.heard: set[str] = set()
        self._port = port
        self._counts = counts
        self._tls = tls
        self._is_deaf = is_deaf

    async def run(self, ended: asyncio.Event) -> None:
        """Ask until then, and for what is open to its end."""
        while not ended.is_set():
            name = "localhost" if self._tls is not None else None
            reader, writer = await asyncio.open_connection(HOST, self._port, ssl=self._tls, server_hostname=name)
            talk = _Talk(self._counts, self.heard, reader, writer, is_deaf=self._is_deaf)
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await talk.run(ended)
            except (OSError, EOFError, TimeoutError) as error:
                talk.give_up(repr(error))
            finally:
                writer.close()


class _Talk:
    """One connection."""

    def __init__(
        self,
        counts: Counts,
        heard: set[str],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        is_deaf: bool,
    ) -> None:
        self._counts = counts
        self._heard = heard
        self._reader = reader
        self._writer = writer
        self._is_deaf = is_deaf
        self._encoder, self._decoder = Encoder(), Decoder()
        self._received = b""
        self._next = 1
        # The bodies of the streams that are open.
        self._open: dict[int, bytes] = {}
        self._last: int | None = None

    async def run(self, ended: asyncio.Event) -> None:
        settings = {SettingsFrame.INITIAL_WINDOW_SIZE: WINDOW_BYTES}
        self._writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0, settings).serialize())
        self._writer.write(WindowUpdateFrame(0, WINDOW_BYTES).serialize())
        while True:
            if not ended.is_set() and (self._last is None or (self._is_deaf and self._last == ANY_STREAM)):
                while len(self._open) < AT_ONCE:
                    self._ask()
            elif not self._open:
                return
            for frame in await self._read_frames():
                self._hear(frame)

    def give_up(self, reason: str) -> None:
        """Take stock of the streams that have had no answer when the connection ended."""
        for stream in self._open:
            if self._last is not None and stream > self._last:
                self._counts.refused += 1
            else:
                self._counts.lost.append(f"stream {stream}, the last of GOAWAY: {self._last}: {reason}")

    def _ask(self) -> None:
        stream, self._next = self._next, self._next + 2
        path = f"/slow/{random.choice(SECONDS)}/{stream}"
        method, body = random.choice([("GET", b""), ("POST", b"some data")])
        headers = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "localhost")]
        flags = ["END_HEADERS"] if body else ["END_HEADERS", "END_STREAM"]
        self._writer.write(HeadersFrame(stream, self._encoder.encode(headers), flags=flags).serialize())
        if body:
            self._writer.write(DataFrame(stream, body, flags=["END_STREAM"]).serialize())
        self._open[stream] = b""

    def _hear(self, frame: Frame) -> None:
        stream = frame.stream_id
        match frame:
            case SettingsFrame() if "ACK" not in frame.flags:
                self._writer.write(SettingsFrame(0, flags=["ACK"]).serialize())
            case PingFrame() if "ACK" not in frame.flags:
                self._writer.write(PingFrame(0, frame.opaque_data, flags=["ACK"]).serialize())
            case GoAwayFrame():
                assert frame.error_code == 0, frame
                # It may only become smaller (RFC 9113, 6.8).
                assert self._last is None or frame.last_stream_id <= self._last, frame
                self._counts.goodbyes += self._last is None
                self._last = frame.last_stream_id
                for above in [each for each in self._open if each > self._last]:
                    del self._open[above]
                    self._counts.refused += 1
                if self._is_deaf and self._last != ANY_STREAM:
                    # The server refuses it, or ends the connection before.
                    self._ask()
            case RstStreamFrame() if stream in self._open:
                del self._open[stream]
                if frame.error_code == REFUSED_STREAM:
                    self._counts.refused += 1
                else:
                    self._counts.lost.append(f"stream {stream} was reset: {frame.error_code}")
            case HeadersFrame():
                status = dict(self._decoder.decode(frame.data, raw=True))[b":status"]
                if status != b"200":
                    self._counts.lost.append(f"stream {stream}: {status!r}")
                    self._open.pop(stream, None)
            case DataFrame() if stream in self._open:
                self._open[stream] += frame.data
        if stream in self._open and "END_STREAM" in frame.flags:
            assert self._last is None or stream <= self._last, "a stream above the last one was answered"
            generation, _, text = self._open.pop(stream).decode().partition(" ")
            if text == str(stream):
                self._counts.answers[generation] += 1
                self._heard.add(generation)
            else:
                self._counts.lost.append(f"stream {stream} was answered with {text!r}")

    async def _read_frames(self) -> list[Frame]:
        """Wait for frames, and return all that have come.

        Whoever asks before they are heard may ask on a connection that has ended, and lose what they say of that.
        """
        frames: list[Frame] = []
        while not frames:
            if not (piece := await self._reader.read(READ_BYTES)):
                raise EOFError("the connection has ended")
            self._received += piece
            while len(self._received) >= HEADER_BYTES:
                frame, length = Frame.parse_frame_header(memoryview(self._received[:HEADER_BYTES]))
                end = HEADER_BYTES + length
                if len(self._received) < end:
                    break
                frame.parse_body(memoryview(self._received[HEADER_BYTES:end]))
                self._received = self._received[end:]
                frames.append(frame)
        return frames
