"""Clients of HTTP/1.1 in the middle of asking when a drain begins: whatever they have sent is answered, in order."""

from __future__ import annotations

import pytest

from tests.scenarios.servers.one_client import run_program

pytestmark = pytest.mark.main_python_only

# One client asks for /wait and two more, and for a fourth thing once the drain has begun. Another one has sent half of
# a head. A third one asks for /wait and sends no more. Then /wait is answered.
PROGRAM = """
import socket, sys, threading
import anyio
from tests.scenarios.servers.one_client import live, run

begun, released = [], anyio.Event()

async def respond(path):
    begun.append(path)
    if path == "/wait":
        await released.wait()
    return path.encode()

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await live(receive, send)
    body = await respond(scope["path"])
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})

async def answer(request):
    from aiohttp import web
    return web.Response(body=await respond(request.path))

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
    if "zttp" in sys.argv[2]:
        print("begun", sorted(begun))

run(*sys.argv[1:3], client, asgi=app, aiohttp=answer)
"""


# uvicorn and aiohttp take who sends no more for somebody who has gone, with and without a restart.
@pytest.mark.parametrize(
    ("loop", "kind", "half_closed"),
    [
        ("asyncio", "uvicorn http=h11", "left alone"),
        ("uvloop", "uvicorn http=httptools", "left alone"),
        ("asyncio", "hypercorn", "answered"),
        ("uvloop", "hypercorn", "answered"),
        ("trio", "hypercorn", "answered"),
        ("uvloop", "aiohttp", "left alone"),
        ("asyncio", "aiohttp", "left alone"),
    ],
)
def test_whatever_was_sent_when_the_drain_begins_is_answered(loop: str, kind: str, half_closed: str) -> None:
    done = run_program(PROGRAM, loop, kind, half_closed)
    said = [
        "half ('/half', 'close')",
        "pipelined ('/wait', '') ('/1', '') ('/2', '') ('/3', 'close')",
        *(["closed ['/wait']"] if half_closed == "answered" else []),
    ]
    assert (done.returncode, done.stdout.splitlines()) == (0, said), done.stderr


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_where_a_server_does_not_show_what_it_has_read_the_first_answer_says_that_there_are_no_more(loop: str) -> None:
    """The application has seen none of the others, so that the client may ask them anew (RFC 9112, 9.3.2 and 9.6)."""
    done = run_program(PROGRAM, loop, "uvicorn http=zttp", "left alone")
    said = ["half ('/half', 'close')", "pipelined ('/wait', 'close')", "begun ['/half', '/wait', '/wait']"]
    assert (done.returncode, done.stdout.splitlines()) == (0, said), done.stderr
