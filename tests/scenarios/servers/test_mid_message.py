"""Clients in the middle of a WebSocket message when the goodbyes are said: idle ones are told first, these last."""

from __future__ import annotations

import pytest

from tests.scenarios.servers.one_client import run_program

pytestmark = pytest.mark.main_python_only

# Four clients have sent a part of a message: half of a large frame, or the first of two. One is idle. They end their
# messages once the idle one was told to come back.
PROGRAM = """
import socket, sys
from tests.scenarios.servers.one_client import live, run

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await live(receive, send)
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": str(len(message["text"]))})

async def talk(request):
    from aiohttp import web
    websocket = web.WebSocketResponse()
    await websocket.prepare(request)
    async for message in websocket:
        await websocket.send_str(str(len(message.data)))
    return websocket

async def echo(websocket):
    async for message in websocket:
        await websocket.send(str(len(message)))

HANDSHAKE = (
    b"GET / HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: Upgrade\\r\\nUpgrade: websocket\\r\\n"
    b"Sec-WebSocket-Version: 13\\r\\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\\r\\n\\r\\n"
)
MASK = bytes(4)
LARGE = b"\\x81\\xfe" + (1000).to_bytes(2) + MASK + b"x" * 1000
PARTS = [(LARGE[:500], LARGE[500:]), (b"\\x01\\x85" + MASK + b"hello", b"\\x80\\x85" + MASK + b"world")]

def read_frame(file):
    head = file.read(2)
    return (head[0] & 15, file.read(head[1])) if len(head) == 2 else None

def begin(port):
    sock = socket.create_connection(("127.0.0.1", port))
    file = sock.makefile("rb")
    sock.sendall(HANDSHAKE)
    while file.readline().strip():
        pass
    # Answered: the handler is there.
    sock.sendall(b"\\x81\\x81" + MASK + b"x")
    assert read_frame(file) == (1, b"1")
    return sock, file

def see_closed(sock, file):
    opcode, payload = read_frame(file)
    assert (opcode, int.from_bytes(payload[:2])) == (8, 1012), (opcode, payload)
    sock.sendall(b"\\x88\\x82" + MASK + payload[:2])
    sock.close()

def client(port, call, ecdysis):
    busy = [(begin(port), *PARTS[number % 2]) for number in range(4)]
    idle = begin(port)
    for (sock, _), first, _ in busy:
        sock.sendall(first)
    call(ecdysis.stop)
    see_closed(*idle)
    for (sock, file), _, second in busy:
        sock.sendall(second)
    print([read_frame(file) for (_, file), _, _ in busy])
    for (sock, file), _, _ in busy:
        see_closed(sock, file)
    print("all told")

run(*sys.argv[1:], client, asgi=app, aiohttp=talk, websockets=echo, drain_timeout=10)
"""

# The client says two things more, and answers then. It takes longer than a handler may do something else.
SLOW_TO_ANSWER = (
    PROGRAM[: PROGRAM.index("def client")]
    + """
import threading
from ecdysis_async.servers import aiohttp as adapter

adapter.HANDLER_SECONDS = 0.0
heard = []

async def hear(request):
    from aiohttp import web
    websocket = web.WebSocketResponse()
    await websocket.prepare(request)
    async for message in websocket:
        heard.append(message.data)
        if message.data == "x":
            await websocket.send_str("1")
    return websocket

def client(port, call, ecdysis):
    sock, file = begin(port)
    call(ecdysis.stop)
    opcode, payload = read_frame(file)
    for number in (2, 3):
        sock.sendall(b"\\x81\\x81" + MASK + b"y")
        while len(heard) < number:
            threading.Event().wait(0.01)
    sock.sendall(b"\\x88\\x82" + MASK + payload[:2])
    print(opcode, int.from_bytes(payload[:2]), file.read())

run(*sys.argv[1:], client, asgi=app, aiohttp=hear, drain_timeout=10)
"""
)

# The client says nothing more, and the farewell is early. It would be waited for until the deadline.
GONE = (
    PROGRAM[: PROGRAM.index("def client")]
    + """
from ecdysis_async._connections import tracker
from ecdysis_async.servers import aiohttp as adapter

adapter.ANSWER_SECONDS = 3600.0
tracker.FAREWELL_SECONDS, tracker.FAREWELL_SHARE = 59.0, 1.0

async def hear(request):
    websocket = await talk(request)
    print("ends by itself")
    return websocket

def client(port, call, ecdysis):
    sock, file = begin(port)
    call(ecdysis.stop)
    opcode, payload = read_frame(file)
    print(opcode, int.from_bytes(payload[:2]), file.read())

run(*sys.argv[1:], client, asgi=app, aiohttp=hear, drain_timeout=60)
"""
)

KINDS = ("uvicorn ws=websockets-sansio", "uvicorn ws=wsproto", "hypercorn", "aiohttp", "websockets")


@pytest.mark.parametrize(
    ("loop", "kind"),
    [*((loop, kind) for loop in ("asyncio", "uvloop") for kind in KINDS), ("trio", "hypercorn")],
)
def test_idle_websockets_are_told_first_and_those_in_a_message_last(loop: str, kind: str) -> None:
    done = run_program(PROGRAM, loop, kind)
    answers = [(1, b"1000"), (1, b"10")] * 2
    assert (done.returncode, done.stdout) == (0, f"{answers}\nall told\n"), done.stderr


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_websocket_of_aiohttp_is_heard_until_its_client_has_answered(loop: str) -> None:
    done = run_program(SLOW_TO_ANSWER, loop, "aiohttp")
    assert (done.returncode, done.stdout) == (0, "8 1012 b''\n"), done.stderr


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_handler_of_a_client_that_is_gone_ends_by_itself_before_the_deadline(loop: str) -> None:
    done = run_program(GONE, loop, "aiohttp")
    assert (done.returncode, done.stdout) == (0, "ends by itself\n8 1012 b''\n"), done.stderr
