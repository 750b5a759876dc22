"""Several servers in one program: it is ready with the last of them, and each adapter touches its own servers only."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.ports import find_free_port
from tests.scenarios import programs

pytestmark = pytest.mark.main_python_only

PROGRAM = Path(__file__).with_name("several.py")

SLOW = 1.0

MIXES = [
    # The first one is ready long before the last one, and the other way round.
    ("uvicorn:0", f"aiohttp:{SLOW}"),
    (f"hypercorn:{SLOW}", "uvicorn:0", "websockets:0", "aiohttp:0", "streams:0", "anyio:0"),
    ("aiohttp:0", "aiohttp:0.2", "uvicorn:0", "uvicorn:0.4", "websockets:0", "websockets:0"),
]


def with_ports(servers: tuple[str, ...]) -> list[str]:
    return [f"{server.partition(':')[0]}:{find_free_port()}:{server.partition(':')[2]}" for server in servers]


def check(directory: Path, loop: str, servers: tuple[str, ...], *, anchored: bool = False) -> None:
    ended = programs.run(directory, PROGRAM, *with_ports(servers), LOOP=loop, anchored=anchored)
    # websockets asks the client to upgrade.
    answers = " ".join("426" if server.startswith("websockets") else "200" for server in servers)
    # The second generation asks while the first one does.
    assert sorted(ended.output.splitlines()) == [
        f"generation 1, serving: {answers}",
        f"generation 1, settled: {answers}",
        f"generation 2, serving: {answers}",
        "settled",
    ], f"{ended.output}\n{ended.log}"
    assert ended.status == 0
    assert "Traceback" not in ended.log


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("servers", MIXES, ids=lambda servers: "-".join(each.partition(":")[0] for each in servers))
def test_a_program_is_ready_with_the_last_of_its_servers(servers: tuple[str, ...], loop: str, tmp_path: Path) -> None:
    check(tmp_path, loop, servers)


def test_two_servers_on_trio(tmp_path: Path) -> None:
    check(tmp_path, "trio", (f"hypercorn:{SLOW}", "hypercorn:0", "anyio:0"))


def test_two_servers_in_a_worker_of_an_anchor(tmp_path: Path) -> None:
    check(tmp_path, "auto", ("uvicorn:0", f"aiohttp:{SLOW}"), anchored=True)


def test_a_server_that_never_gets_ready_is_named(tmp_path: Path) -> None:
    servers = with_ports(("uvicorn:0", "aiohttp:3600"))
    port = servers[1].split(":")[1]
    ended = programs.run(tmp_path, PROGRAM, *servers, LOOP="asyncio", READY_TIMEOUT="20")
    assert ended.status == 1
    assert f"waiting for aiohttp on 127.0.0.1:{port}" in ended.log
    assert f"TimeoutError: aiohttp on 127.0.0.1:{port} did not get ready within 16 s" in ended.log


WHAT = {
    "uvicorn": "WebSocket /slow",
    "hypercorn": "WebSocket /slow",
    "aiohttp": "GET /slow",
    "websockets": "WebSocket /slow",
    "streams": "a connection to tcp:127.0.0.1:PORT from 127.0.0.1:PORT",
    "anyio": "a connection to tcp:127.0.0.1:PORT from 127.0.0.1:PORT",
}


@pytest.mark.parametrize(
    ("loop", "kinds"),
    [
        ("asyncio", ("uvicorn", "hypercorn", "aiohttp", "websockets", "streams", "anyio")),
        ("uvloop", ("uvicorn", "hypercorn", "aiohttp", "websockets", "streams", "anyio")),
        ("trio", ("hypercorn", "anyio")),
    ],
)
def test_what_is_cut_at_the_deadline_is_named(loop: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    servers = with_ports(tuple(f"{kind}:0" for kind in kinds))
    ended = programs.run(tmp_path, PROGRAM, *servers, LOOP=loop, MODE="cut")
    former, latter = map(json.loads, ended.output.splitlines())
    assert former == latter
    ports = re.compile(r":[0-9]{4,}")
    ages = re.compile(r", (more than )?[0-9]+\.[0-9] s old$")
    assert sorted(ages.sub("", ports.sub(":PORT", each)) for each in former) == sorted(WHAT[kind] for kind in kinds)
    for each in former:
        assert f"cut at the deadline: {each}\n" in ended.log
    assert "secret" not in "".join(former)
