"""The programs and configurations that the pages of docs/ show do what is said beside them."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import trustme

from tests.ports import find_free_port
from tests.scenarios.run.harness import PROJECT, Run, run_command, running
from tests.scenarios.servers import programs

pytestmark = pytest.mark.main_python_only

SNIPPETS = PROJECT / "docs" / "snippets"
# For what hangs: on a busy machine each process waits for its turn.
PATIENCE_SECONDS = 240


@asynccontextmanager
async def serving(
    directory: Path, target: str, *options: str, opened: list[object] | None = None
) -> AsyncIterator[tuple[Run, aiohttp.ClientSession]]:
    """Serve a program of the pages as they say, for a client that has one connection at a time.

    Args:
        directory: where it runs.
        target: what is served.
        options: of ``ecdysis run``.
        opened: gets an entry for each connection that the client opens.
    """

    async def note(_: object, __: object, parameters: object) -> None:
        if opened is not None:
            opened.append(parameters)

    tracing = aiohttp.TraceConfig()
    tracing.on_connection_create_end.append(note)
    # However busy the machine is, no time-out ends what the program itself shall end.
    patient = ("--drain-timeout", "60", "--timeout-keep-alive", "600")
    async with running(directory, target, "--app-dir", str(SNIPPETS), "--port", "0", *patient, *options) as run:
        url = f"http://127.0.0.1:{await run.find_port()}"
        connector = aiohttp.TCPConnector(limit=1, keepalive_timeout=600)
        async with aiohttp.ClientSession(url, connector=connector, trace_configs=[tracing]) as client:
            yield run, client


async def get(client: aiohttp.ClientSession, path: str = "/") -> str:
    async with client.get(path) as answer:
        assert answer.status == 200
        return await answer.text()


async def restart(run: Run) -> None:
    code, output = await run.restart("--until", "drained")
    assert code == 0, output


@pytest.mark.parametrize("path", sorted(SNIPPETS.rglob("*.py")), ids=lambda path: path.stem)
def test_a_program_is_shown_in_a_page_and_compiles(path: Path) -> None:
    compile(path.read_text(), path, "exec")
    pages = "\n".join(page.read_text() for page in (PROJECT / "docs").glob("*.md"))
    assert f"{{literalinclude}} snippets/{path.relative_to(SNIPPETS)}" in pages


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("first_app:app", ()),
        ("django_app:application", ()),
        ("litestar_app:app", ()),
        ("aiohttp_app:create_app", ("--factory",)),
    ],
)
def test_a_kept_connection_goes_on_in_the_next_process(target: str, options: tuple[str, ...], tmp_path: Path) -> None:
    async def test() -> None:
        opened: list[object] = []
        async with serving(tmp_path, target, *options, opened=opened) as (run, client):
            before = await get(client)
            await restart(run)
            assert await get(client) != before
            assert len(opened) == 1

    asyncio.run(test())


def test_events_end_and_the_client_is_told_to_come_back(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path, "fastapi_sse:app") as (run, client), client.get("/events") as answer:
            assert (await answer.content.readline()).startswith(b"data: process")
            await restart(run)
            assert (await answer.content.read()).endswith(b"retry: 100\n\n")

    asyncio.run(test())


def test_a_websocket_moves_with_its_counter(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path, "fastapi_websocket:app", "--ws", "websockets-sansio") as (run, client):
            async with client.ws_connect("/count") as websocket:
                await websocket.send_str("a")
                first = await websocket.receive_str()
                await restart(run)
                await websocket.send_str("b")
                second = await websocket.receive_str()
            assert (first[:2], second[:2]) == ("1 ", "2 ")
            assert first.split()[2] != second.split()[2]

    asyncio.run(test())


def test_a_restart_waits_for_background_work(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path, "fastapi_background:app") as (run, client):
            for path in ("/background", "/task"):
                assert await get(client, path) == '"queued"'
            await restart(run)
            sent = [line.split()[0] for line in (tmp_path / "sent.log").read_text().splitlines()]
            assert sorted(sent) == ["background", "task"]

    asyncio.run(test())


def test_the_scheduler_is_passed_on(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path, "fastapi_scheduler:app", "--workers", "2") as (run, _):
            holders = await wait_for_jobs(tmp_path / "jobs.log", 1)
            await restart(run)
            assert await wait_for_jobs(tmp_path / "jobs.log", 2) != holders

    asyncio.run(test())


async def wait_for_jobs(log: Path, processes: int) -> set[str]:
    """Wait until so many processes have done a job, one after the other; return them."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            lines = log.read_text().splitlines() if log.exists() else []
            if len(found := set(lines)) >= processes:
                return found
            await asyncio.sleep(0.05)


def test_a_consumer_leaves_the_next_job_to_the_next_process(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(tmp_path, "queue_consumer:main", "--app-dir", str(SNIPPETS)) as run:
            first = await run.wait_for(r"done job by (\d+)")
            await restart(run)
            await run.wait_for(rf"done job by (?!{first}$)\d+")
            lines = [line.rpartition(" ")[2] for line in run.lines if line.startswith("done job")]
            # One after the other: the first process has done no job behind one of the second process.
            assert lines == sorted(lines, key=lambda pid: pid != first)

    asyncio.run(test())


def test_a_port_for_metrics_is_passed_on(tmp_path: Path) -> None:
    port = find_free_port()

    async def test() -> None:
        target = ("metrics_port:app", "--app-dir", str(SNIPPETS), "--port", "0")
        async with running(tmp_path, *target, METRICS_PORT=str(port)) as run, aiohttp.ClientSession() as client:
            await run.find_port()
            await wait_for_metrics(client, port)
            await restart(run)
            await wait_for_metrics(client, port)

    asyncio.run(test())


async def wait_for_metrics(client: aiohttp.ClientSession, port: int) -> None:
    """Wait until one of the processes has the port."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            try:
                async with client.get(f"http://127.0.0.1:{port}/metrics") as answer:
                    assert "python_info" in await answer.text()
                    return
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.05)


def test_log_files_of_ones_own_are_opened_anew(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("from audit_log import audit, reopen\nfrom first_app import app\n")

    async def test() -> None:
        async with running(tmp_path, "app:app", "--port", "0", PYTHONPATH=f"{PROJECT}:{SNIPPETS}") as run:
            await run.find_port()
            (tmp_path / "audit.log").rename(tmp_path / "audit.log.1")
            code, output = await asyncio.to_thread(run_command, "reopen-logs", "--control", str(tmp_path / "control"))
            assert code == 0, output
            assert (tmp_path / "audit.log").exists()

    asyncio.run(test())


def test_a_restart_takes_up_a_renewed_certificate_or_keeps_the_old_one(tmp_path: Path) -> None:
    pem = tmp_path / "service.pem"

    def renew() -> ssl.SSLContext:
        authority, context = trustme.CA(), ssl.create_default_context()
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(pem))
        authority.configure_trust(context)
        return context

    async def test() -> None:
        first = renew()
        options = ("--app-dir", str(SNIPPETS), "--certfile", str(pem), "--port", "0")
        async with running(tmp_path, "first_app:app", *options) as run, aiohttp.ClientSession() as client:
            url = f"https://127.0.0.1:{await run.find_port()}/"

            async def ask(context: ssl.SSLContext) -> int:
                async with client.get(url, ssl=context, headers={"Connection": "close"}) as answer:
                    return answer.status

            assert await ask(first) == 200
            pem.write_text("no certificate")
            code, output = await run.restart()
            assert code == 1, output
            assert await ask(first) == 200
            second = renew()
            await restart(run)
            assert await ask(second) == 200
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await ask(first)

    asyncio.run(test())


def test_a_client_of_socket_io_connects_anew(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path, "socketio_app:app") as (run, client):
            path = "/socket.io/?EIO=4&transport=polling"
            opened = json.loads((await get(client, path))[1:])
            poll = asyncio.create_task(get(client, f"{path}&sid={opened['sid']}"))
            await restart(run)
            await poll
            assert json.loads((await get(client, path))[1:])["sid"] != opened["sid"]

    asyncio.run(test())


def test_a_test_of_an_application_passes(tmp_path: Path) -> None:
    # The other one restarts a service under load; tests of the fixture do that.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, "-k", "first_page"]
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}:{SNIPPETS}"}
    run_check([*command, str(SNIPPETS / "fastapi_test.py")], tmp_path, environment)


@pytest.mark.parametrize("name", ["nginx.conf", "nginx-two-versions.conf"])
def test_nginx_takes_the_configuration(name: str, tmp_path: Path) -> None:
    own_paths = "".join(f"{kind}_temp_path {kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    text = (SNIPPETS / name).read_text().replace("http {", f"pid nginx.pid;\nhttp {{ access_log off; {own_paths}", 1)
    (tmp_path / "nginx.conf").write_text(text)
    said = run_check([programs.find("nginx"), "-t", "-p", str(tmp_path), "-e", "stderr", "-c", "nginx.conf"], tmp_path)
    assert "warn" not in said


def test_haproxy_takes_the_configuration(tmp_path: Path) -> None:
    said = run_check([programs.find("haproxy"), "-c", "-q", "-f", str(SNIPPETS / "haproxy.cfg")], tmp_path)
    assert "WARNING" not in said


def run_check(command: list[str], directory: Path, environment: dict[str, str] | None = None) -> str:
    """Run a program that shall find nothing wrong; return what it says besides."""
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


@pytest.mark.parametrize("name", ["deploy.sh", "renew.sh"])
def test_a_shell_takes_the_script(name: str, tmp_path: Path) -> None:
    run_check(["sh", "-n", str(SNIPPETS / name)], tmp_path)


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    # The programs that it names are not there.
    text = (SNIPPETS / "shop.service").read_text()
    text = text.replace("/srv/shop/current/.venv/bin/ecdysis", sys.executable).replace("User=shop", "User=root")
    unit = tmp_path / "shop.service"
    unit.write_text(text.replace("www-data", "root"))
    said = run_check([programs.find("systemd-analyze"), "verify", "--man=no", str(unit)], tmp_path)
    # It looks at all other units of the machine too.
    assert [line for line in said.splitlines() if unit.name in line] == []
