"""Clients of HTTP/1.1 in the middle of asking when a drain begins: whatever they have sent is answered, in order."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.scenarios.servers.harness import PATIENCE_SECONDS, PROJECT

pytestmark = pytest.mark.newest_python_only

# One client asks for /wait and two more, and for a fourth thing once the drain has begun. Another one has sent half of
# a head. A third one asks for /wait and sends no more. Then /wait is answered.
PROGRAM = """
import asyncio, functools, socket, sys, threading
import anyio
import ecdysis_async

begun, released = [], None

async def respond(path):
    if path == "/wait":
        begun.append(path)
        await released.wait()
    return path.encode()

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    body = await respond(scope["path"])
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})

async def serve(kind, ecdysis, sock):
    if kind.startswith("uvicorn"):
        import uvicorn
        from ecdysis_async.servers.uvicorn import serve
        config = uvicorn.Config(app, http=kind.partition(" ")[2], log_config=None)
        await serve(ecdysis, config, [sock])
    elif kind == "hypercorn":
        from hypercorn.config import Config
        from ecdysis_async.servers.hypercorn import serve
        config = Config()
        config.errorlog = None
        await serve(ecdysis, app, config, [sock])
    else:
        from aiohttp import web
        from ecdysis_async.servers.aiohttp import serve
        async def answer(request):
            return web.Response(body=await respond(request.path))
        application = web.Application()
        application.router.add_get("/{path}", answer)
        await serve(ecdysis, application, sock=sock, access_log=None)

def get(path):
    return b"GET %s HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n" % path

def read_all(sock):
    with sock.makefile("rb") as file:
        while line := file.readline():
            assert b" 200 " in line, line
            headers = {}
            while line := file.readline().strip():
                name, _, value = line.partition(b":")
                headers[name.lower()] = value.strip()
            body = file.read(int(headers[b"content-length"]))
            yield body.decode(), headers.get(b"connection", b"").decode()
    sock.close()

def client(port, call, ecdysis):
    pipelined, half, closed = [socket.create_connection(("127.0.0.1", port), 60) for _ in range(3)]
    half.sendall(get(b"/half")[:20])
    closed.sendall(get(b"/wait"))
    if sys.argv[3] == "answered":
        closed.shutdown(socket.SHUT_WR)
    pipelined.sendall(get(b"/wait") + get(b"/1") + get(b"/2"))
    while len(begun) < 2:
        threading.Event().wait(0.01)
    call(ecdysis.stop)
    while not ecdysis.draining.is_set():
        threading.Event().wait(0.01)
    pipelined.sendall(get(b"/3"))
    half.sendall(get(b"/half")[20:])
    print("half", *read_all(half))
    call(released.set)
    print("pipelined", *read_all(pipelined))
    if sys.argv[3] == "answered":
        print("closed", [body for body, _ in read_all(closed)])

async def main(kind):
    global released
    released = anyio.Event()
    async with ecdysis_async.Ecdysis(drain_timeout=30) as ecdysis:
        sock = ecdysis.listen_tcp("127.0.0.1", 0)
        call = by_loop()
        def begin_when_serving():
            while ecdysis.state is not ecdysis_async.State.SERVING:
                threading.Event().wait(0.01)
            try:
                client(sock.getsockname()[1], call, ecdysis)
            finally:
                call(ecdysis.stop)
        threading.Thread(target=begin_when_serving, daemon=True).start()
        await serve(kind, ecdysis, sock)

def by_loop():
    if sys.argv[1] == "trio":
        import trio
        return trio.lowlevel.current_trio_token().run_sync_soon
    return asyncio.get_running_loop().call_soon_threadsafe

if sys.argv[1] == "trio":
    import trio
    trio.run(main, sys.argv[2])
else:
    ecdysis_async.run(functools.partial(main, sys.argv[2]), loop=sys.argv[1])
"""


# uvicorn and aiohttp take who sends no more for somebody who has gone, with and without a restart.
@pytest.mark.parametrize(
    ("loop", "kind", "half_closed"),
    [
        ("asyncio", "uvicorn h11", "left alone"),
        ("uvloop", "uvicorn httptools", "left alone"),
        ("asyncio", "hypercorn", "answered"),
        ("uvloop", "hypercorn", "answered"),
        ("trio", "hypercorn", "answered"),
        ("uvloop", "aiohttp", "left alone"),
        ("asyncio", "aiohttp", "left alone"),
    ],
)
def test_whatever_was_sent_when_the_drain_begins_is_answered(loop: str, kind: str, half_closed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, loop, kind, half_closed],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    said = [
        "half ('/half', 'close')",
        "pipelined ('/wait', '') ('/1', '') ('/2', '') ('/3', 'close')",
        *(["closed ['/wait']"] if half_closed == "answered" else []),
    ]
    assert (done.returncode, done.stdout.splitlines()) == (0, said), done.stderr
