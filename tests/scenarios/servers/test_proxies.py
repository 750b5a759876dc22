"""Behind a reverse proxy that keeps its connections to the service: no client ever sees a 502, or anything else."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.scenarios.servers import programs
from tests.scenarios.servers.clients import Load, by_unix
from tests.scenarios.servers.harness import PATIENCE_SECONDS, find_blemishes, running

pytestmark = pytest.mark.main_python_only

RESTARTS = 10

# Those of a real service but for the probation: connections that a proxy keeps idle stay open for long, and a proxy
# lets go of them earlier than the drain does.
SETTINGS = {"probation": 0.05, "drain_timeout": 30, "max_draining": RESTARTS + 1}

# To clients of a proxy a connection that is idle has no end.
KINDS = ("new", "keep-alive", "slow", "websocket", "stream")

# Neither proxy may ask a second time: what fails once is to be seen.
NGINX = """\
daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr warn;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    map $http_upgrade $to_service {{ default upgrade; "" ""; }}
    upstream service {{
        server 127.0.0.1:{port};
        keepalive 8;
        keepalive_timeout 10s;
    }}
    server {{
        listen unix:{front};
        location / {{
            proxy_pass http://service;
            proxy_http_version 1.1;
            proxy_set_header Host $host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $to_service;
            proxy_next_upstream off;
            proxy_buffering off;
        }}
    }}
}}
"""

HAPROXY = """\
global
    maxconn 512
defaults
    mode http
    retries 0
    http-reuse always
    timeout connect 10s
    timeout client 60s
    timeout server 60s
    timeout tunnel 60s
frontend front
    bind unix@{front}
    default_backend service
backend service
    server one 127.0.0.1:{port} pool-purge-delay 2s
"""


def nginx(directory: Path, port: int) -> list[str]:
    """Write nginx's configuration; return its command."""
    (directory / "nginx.conf").write_text(NGINX.format(front=directory / "front", port=port))
    # Its workers need not be somebody who cannot reach a directory of ours.
    user = ["-g", "user root;"] if os.geteuid() == 0 else []
    return [programs.find("nginx"), "-p", str(directory), "-e", "stderr", "-c", "nginx.conf", *user]


def haproxy(directory: Path, port: int) -> list[str]:
    """Write HAProxy's configuration; return its command."""
    (directory / "haproxy.cfg").write_text(HAPROXY.format(front=directory / "front", port=port))
    return [programs.find("haproxy"), "-db", "-f", "haproxy.cfg"]


@pytest.mark.timeout(600)  # some ten seconds on an idle machine
@pytest.mark.parametrize(
    ("configure", "server", "loop"),
    [
        (nginx, "uvicorn", "uvloop"),
        (nginx, "uvicorn-moving", "asyncio"),
        (haproxy, "hypercorn", "asyncio"),
        (haproxy, "aiohttp", "uvloop"),
    ],
)
def test_behind_a_proxy(configure: Callable[[Path, int], list[str]], server: str, loop: str, tmp_path: Path) -> None:
    programs.find(configure.__name__)
    asyncio.run(restart_behind_a_proxy(configure, server, loop, tmp_path))


async def restart_behind_a_proxy(
    configure: Callable[[Path, int], list[str]], server: str, loop: str, directory: Path
) -> None:
    async with running(server, loop, directory, is_main=True, settings=SETTINGS) as service:
        with programs.running(configure(directory, service.port), directory) as proxy:
            front = directory / "front"
            await wait_until_listening(front, proxy)
            clients = Load(by_unix(front), KINDS)
            async with asyncio.TaskGroup() as task_group:
                task_group.create_task(clients.run())
                for number in range(RESTARTS):
                    report = await service.restart()
                    assert report.get("outcome") == "settled", report
                    await service.wait_for_generations(number + 2)
                    while not clients.generations[number + 2]:  # noqa: ASYNC110 - an answer has no event
                        await asyncio.sleep(0.01)
                clients.end()

    assert not clients.failures, clients.failures
    assert set(clients.answers) == set(KINDS)
    assert sorted(clients.generations) == service.generations
    reports = [service.reports[pid] for pid in service.pids[:-1]]
    assert [report and report.drain.cut for report in reports] == [0] * RESTARTS
    assert find_blemishes(directory) == []


async def wait_until_listening(path: Path, proxy: subprocess.Popen[bytes]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            assert proxy.poll() is None, "the proxy has ended"
            try:
                _, writer = await asyncio.open_unix_connection(path)
            except OSError:
                await asyncio.sleep(0.01)
            else:
                writer.close()
                return
