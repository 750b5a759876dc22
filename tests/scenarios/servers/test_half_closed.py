"""hypercorn on asyncio and uvloop: who sends no more is answered, and let go of then."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.scenarios.servers.harness import PATIENCE_SECONDS, PROJECT

pytestmark = pytest.mark.main_python_only

# Each turn of the loop takes as long as if others had the processor. The client asks three times, says that this was
# all, and waits for its answers; it has no time to be idle that would end in this test.
PROGRAM = """
import asyncio, socket, sys, time
import ecdysis_async
from ecdysis_async.servers import hypercorn
from hypercorn.config import Config

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})

def hold_up():
    time.sleep(0.03)
    loop.call_soon(hold_up)

def ask(port):
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"GET / HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n" * 3)
        sock.shutdown(socket.SHUT_WR)
        answers = b""
        while piece := sock.recv(10_000):
            answers += piece
        return answers.count(b" 200 ")

async def watch(ecdysis, port):
    while ecdysis.state is not ecdysis_async.State.SERVING:
        await asyncio.sleep(0.01)
    hold_up()
    print(await asyncio.to_thread(ask, port))
    while len(ecdysis._tracker):
        await asyncio.sleep(0.01)
    ecdysis.stop()

async def main():
    global loop
    loop = asyncio.get_running_loop()
    config = Config()
    config.keep_alive_timeout = 600
    config.errorlog = None
    async with ecdysis_async.Ecdysis() as ecdysis, asyncio.TaskGroup() as task_group:
        sock = ecdysis.listen_tcp("127.0.0.1", 0)
        task_group.create_task(watch(ecdysis, sock.getsockname()[1]))
        await hypercorn.serve(ecdysis, app, config, [sock])

ecdysis_async.run(main, loop=sys.argv[1])
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_who_sends_no_more_is_answered_and_then_let_go(loop: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, loop],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
