"""A service of the release before hands over to this one and back, as real processes under load: nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from pathlib import Path
from typing import IO

import pytest

from benchmarks.load import Load, Mix
from benchmarks.running import running as running_plain
from tests.scenarios.releases.conftest import Deployment
from tests.scenarios.run.commands import Visitors, call, running, taking_over, write_app

pytestmark = pytest.mark.main_python_only

MIX = Mix(new_per_second=20, hasty=1, keep_alive=3, slow=2, slow_seconds=(0.05, 0.2), silent=1)
OPTIONS = ("--probation", "0.05", "--drain-timeout", "5", "--max-draining", "4")

QUICK = ("--bind", "127.0.0.1:0", "--probation", "0.05", "--drain-timeout", "2")

# What an application answers with: where the library is that has loaded it.
WHERE = """
import os, ecdysis_async
TEXT = os.path.realpath(ecdysis_async.__file__).rpartition("/ecdysis_async/")[0].encode()
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_a_service_changes_its_release_and_changes_it_back(loop: str, deployment: Deployment, tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("wb") as stderr:
        asyncio.run(change_and_change_back(loop, deployment, stderr))
    assert (tmp_path / "stderr").read_text() == ""


async def change_and_change_back(loop: str, deployment: Deployment, stderr: IO[bytes]) -> None:
    deployment.deploy("former")
    async with running_plain("--loop", loop, *OPTIONS, stderr=stderr, directory=deployment.link) as service:
        clients = Load(service.port, MIX)
        async with asyncio.TaskGroup() as task_group:
            task_group.create_task(clients.run())
            for release in ("this", "former", "this"):
                place = deployment.deploy(release)
                await service.restart()
                assert os.readlink(f"/proc/{service.newest.pid}/cwd") == place
                while not clients.counts.generations[max(service.generations)]:
                    await clients.wait_for_end(0.01)
            clients.end()
        await service.stop()
    assert clients.counts.failures == Counter()
    assert clients.counts.answers == clients.counts.requests
    assert [report.drain.cut for report in service.reports.values()] == [0] * 3


def test_an_anchor_and_its_workers_change_their_release_and_change_it_back(
    deployment: Deployment, tmp_path: Path
) -> None:
    write_app(tmp_path / "main.py", "", WHERE)
    options = (*QUICK, "--app-dir", str(tmp_path))
    # The library is where the service is started, and nowhere else.
    environment = {"PYTHONPATH": str(tmp_path)}
    logs = {release: tmp_path / release for release in ("this", "former")}
    for directory in logs.values():
        directory.mkdir()
    place = deployment.deploy("former")
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(
            running(deployment.link, *options, directory=tmp_path, says_control=True, **environment)
        )
        services = [service]

        def command(*arguments: str) -> None:
            done = call(*arguments, "--control", service.control, cwd=deployment.link, **environment)
            assert done.returncode == 0, done.stderr

        with Visitors(service.find_port()) as visitors:
            visitors.wait_for(place)
            for release in ("this", "former"):
                # The workers first, then the anchor, then workers of the anchor's own release.
                place = deployment.deploy(release)
                command("restart")
                visitors.wait_for(place)
                command("restart", "--anchor")
                command("restart")
                visitors.wait_for(place)
            # All of it to a process that has begun by itself.
            for release in ("this", "former"):
                place = deployment.deploy(release)
                former = services[-1]
                newcomer = taking_over(former, deployment.link, *options, directory=logs[release], **environment)
                services.append(stack.enter_context(newcomer))
                assert former.wait() == 0
                visitors.wait_for(place)
        assert visitors.failures == []


# It wants at its start-up what an anchor of the release before knows nothing of.
EXCLUSIVE = """
import ecdysis_async

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        if hasattr(ecdysis_async, "exclusive"):
            async with ecdysis_async.exclusive("migration"):
                pass
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    body = b"new" if hasattr(ecdysis_async, "exclusive") else b"old"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"3")]})
    await send({"type": "http.response.body", "body": body})
"""


def test_exclusive_under_an_anchor_that_does_not_know_it_says_what_to_do(
    deployment: Deployment, tmp_path: Path
) -> None:
    (tmp_path / "main.py").write_text(EXCLUSIVE)
    environment = {"PYTHONPATH": str(tmp_path)}
    deployment.deploy("former")
    options = (*QUICK, "--app-dir", str(tmp_path))
    with running(deployment.link, *options, directory=tmp_path, says_control=True, **environment) as service:

        def restart(*arguments: str) -> tuple[int, str]:
            done = call("restart", *arguments, "--control", service.control, cwd=deployment.link, **environment)
            return done.returncode, done.stderr

        with Visitors(service.find_port()) as visitors:
            visitors.wait_for("old")
            deployment.deploy("this")
            code, told = restart()
            assert code == 1, told
            assert "exclusive('migration') needs an anchor that knows of it" in told
            assert "`ecdysis restart --anchor` upgrades it" in told
            assert restart("--anchor") == (0, "")
            assert restart()[0] == 0
            visitors.wait_for("new")
        assert visitors.failures == []
