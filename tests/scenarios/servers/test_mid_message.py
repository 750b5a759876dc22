"""Clients in the middle of a WebSocket message when the goodbyes are said: idle ones are told first, these last."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.scenarios.servers.harness import PATIENCE_SECONDS, PROJECT

pytestmark = pytest.mark.newest_python_only

# Four clients have sent a part of a message: half of a large frame, or the first of two. One is idle. They end their
# messages once the idle one was told to come back.
PROGRAM = """
import asyncio, functools, socket, sys, threading
import anyio
import ecdysis_async

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
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

async def serve(kind, ecdysis, sock):
    if kind.startswith("uvicorn"):
        import uvicorn
        from ecdysis_async.servers.uvicorn import serve
        config = uvicorn.Config(app, ws=kind.partition(" ")[2], log_config=None)
        await serve(ecdysis, config, [sock])
    elif kind == "hypercorn":
        from hypercorn.config import Config
        from ecdysis_async.servers.hypercorn import serve
        config = Config()
        config.errorlog = None
        await serve(ecdysis, app, config, [sock])
    elif kind == "aiohttp":
        from aiohttp import web
        from ecdysis_async.servers.aiohttp import serve
        application = web.Application()
        application.router.add_get("/", talk)
        await serve(ecdysis, application, sock=sock)
    else:
        from ecdysis_async.servers.websockets import serve
        await serve(ecdysis, echo, socks=[sock], compression=None)

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

def client(port, stop):
    busy = [(begin(port), *PARTS[number % 2]) for number in range(4)]
    idle = begin(port)
    for (sock, _), first, _ in busy:
        sock.sendall(first)
    stop()
    see_closed(*idle)
    for (sock, file), _, second in busy:
        sock.sendall(second)
    print([read_frame(file) for (_, file), _, _ in busy])
    for (sock, file), _, _ in busy:
        see_closed(sock, file)
    print("all told")

async def main(kind):
    async with ecdysis_async.Ecdysis(drain_timeout=10) as ecdysis:
        sock = ecdysis.listen_tcp("127.0.0.1", 0)
        def begin_when_serving():
            while ecdysis.state is not ecdysis_async.State.SERVING:
                threading.Event().wait(0.01)
            stop = functools.partial(call, ecdysis.stop)
            try:
                client(sock.getsockname()[1], stop)
            finally:
                stop()
        call = by_loop()
        threading.Thread(target=begin_when_serving, daemon=True).start()
        await serve(kind, ecdysis, sock)

def by_loop():
    if sys.argv[1] == "trio":
        import trio
        token = trio.lowlevel.current_trio_token()
        return token.run_sync_soon
    return asyncio.get_running_loop().call_soon_threadsafe

if sys.argv[1] == "trio":
    import trio
    trio.run(main, sys.argv[2])
else:
    ecdysis_async.run(functools.partial(main, sys.argv[2]), loop=sys.argv[1])
"""

KINDS = ("uvicorn websockets-sansio", "uvicorn wsproto", "hypercorn", "aiohttp", "websockets")


@pytest.mark.parametrize(
    ("loop", "kind"),
    [*((loop, kind) for loop in ("asyncio", "uvloop") for kind in KINDS), ("trio", "hypercorn")],
)
def test_idle_websockets_are_told_first_and_those_in_a_message_last(loop: str, kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, loop, kind],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    answers = [(1, b"1000"), (1, b"10")] * 2
    assert (done.returncode, done.stdout) == (0, f"{answers}\nall told\n"), done.stderr
