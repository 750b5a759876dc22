"""Connections of HTTP and WebSockets keep their sockets under ``ecdysis run``, each in the line of its worker."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.scenarios.run.harness import HERE, running
from tests.scenarios.servers.clients import read_head
from tests.scenarios.transfer.clients import Crowd
from tests.scenarios.transfer.test_websockets import Counting

pytestmark = pytest.mark.main_python_only

# Each starts two interpreters that import uvicorn.
RESTARTS = 2
OPTIONS = ("ws=websockets-sansio", "lifespan=off", "timeout_keep_alive=600")


def test_connections_move_to_the_successor_of_their_worker(tmp_path: Path) -> None:
    asyncio.run(restart_among("uvloop", tmp_path))


async def restart_among(loop: str, directory: Path) -> None:
    arguments = [
        "tests.scenarios.transfer.run_app:app",
        "--workers",
        "2",
        "--loop",
        loop,
        "--port",
        "0",
        "--no-access-log",
    ]
    # All of them move: no deadline ends what a busy machine has not moved yet.
    arguments += ["--drain-timeout", "60", *(f"--server-option={option}" for option in OPTIONS)]
    async with running(directory, *arguments) as run, asyncio.TaskGroup() as task_group:
        port = await run.find_port()
        crowd = Crowd(port, idle=40, active=8)
        websockets = [Counting(number, port) for number in range(8)]
        ending = asyncio.Event()
        for each in (crowd.run(), *(websocket.run(ending) for websocket in websockets)):
            task_group.create_task(each)
        await crowd.all_arrived()
        moved: dict[int, int] = {}
        for _ in range(RESTARTS):
            code, output = await run.restart("--until", "drained", "--json")
            report: dict[str, Any] = json.loads(output)["report"]
            assert (code, report["outcome"], report["drain"]["silent"]) == (0, "settled", 0)
            # All that a worker has it has from its predecessor.
            counts = {each["successor_pid"]: each["drain"]["transferred"] for each in report["workers"]}
            predecessors = {each["successor_pid"]: each["predecessor_pid"] for each in report["workers"]}
            assert sum(counts.values()) == 40 + 8 + 8
            assert not moved or counts == {pid: moved[predecessors[pid]] for pid in counts}
            moved = counts
        ending.set()
        crowd.end()
    assert (crowd.closed, crowd.failures) == (0, {})
    for websocket in websockets:
        assert max(websocket.generations) == RESTARTS + 1


# uvicorn's own patience with a connection that is idle is 5 seconds; a restart on a busy machine takes longer.
@pytest.mark.parametrize(
    ("server", "target", "option"),
    [("uvicorn", "apps:asgi", "timeout_keep_alive=600"), ("aiohttp", "apps:make_aiohttp", "keepalive_timeout=600")],
)
def test_what_the_new_release_refuses_is_told_to_come_back(
    server: str, target: str, option: str, tmp_path: Path
) -> None:
    async def test() -> None:
        config = tmp_path / "service.toml"
        config.write_text(f"factory = {str(server == 'aiohttp').lower()}\n")
        arguments = (target, "--app-dir", str(HERE), "--server", server, "--config", str(config), "--port", "0")
        async with running(tmp_path, *arguments, "--server-option", option) as run:
            reader, writer = await asyncio.open_connection("127.0.0.1", await run.find_port())
            for is_last in (False, True):
                writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                head = await read_head(reader)
                assert (head.get("connection") == "close") is is_last
                await reader.readexactly(int(head["content-length"]))
                if not is_last:
                    config.write_text(f"{config.read_text()}transfer = false\n")
                    code, output = await run.restart()
                    assert code == 0, output
                    await run.wait_for("the successor does not take some connections")
            assert await reader.read() == b""
            writer.close()

    asyncio.run(test())
