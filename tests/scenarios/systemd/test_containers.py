"""``ecdysis run`` as PID 1: of a bare namespace, and of a container of runc."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import dockerfile
import psutil
import pytest

from benchmarks.load import Failure
from tests.ports import find_free_port
from tests.scenarios.systemd.container import Container, has_runc, running
from tests.scenarios.systemd.harness import Client
from tests.scenarios.systemd.load import LOUD, Load
from tests.scenarios.systemd.machine import PATIENCE_SECONDS, PROJECT

pytestmark = pytest.mark.main_python_only

APP = Path(__file__).with_name("app")
COMMAND = [sys.executable, "-m", "ecdysis_async.cli"]


@pytest.fixture(params=["unshare", "runc"])
def kind(request: pytest.FixtureRequest) -> str:
    """Which container."""
    reason = "only root can make containers" if os.geteuid() else ""
    if not reason and request.param == "runc" and not has_runc():
        reason = "runc is not installed (apt-get install runc)"
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    elif reason:
        pytest.skip(reason)
    name: str = request.param
    return name


@pytest.fixture
def port() -> int:
    """Return where the service listens."""
    return find_free_port()


@pytest.fixture
def container(kind: str, tmp_path: Path, port: int) -> Iterator[Container]:
    """A service as PID 1."""
    control = tmp_path / "control"
    control.mkdir(mode=0o700)
    options = [f"--app-dir={APP}", f"--bind=127.0.0.1:{port}", "--workers=2", f"--control={control / 'socket'}"]
    limits = ["--probation=0.05", "--drain-timeout=10"]
    with running(
        kind, tmp_path, [*COMMAND, "run", "app:main", *options, *limits], ADDRESS=f"127.0.0.1:{port}"
    ) as container:
        container.wait_until(lambda: "2 workers" in container.log.read_text())
        yield container
    print(container.log.read_text())  # noqa: T201 - pytest shows it with a failure


def test_it_restarts_in_place_reaps_orphans_and_stops_in_time(
    kind: str, container: Container, tmp_path: Path, port: int
) -> None:
    first = container.first
    restart = [*COMMAND, "restart", f"--control={tmp_path / 'control' / 'socket'}"]
    with Load(port) as load:
        for generation in (2, 3):
            subprocess.run(restart, check=True, cwd=PROJECT, stdout=subprocess.DEVNULL)
            load.wait_for(generation, 30)
    assert load.counts.failures == Counter()
    with Client(("127.0.0.1", port)) as client:
        assert client.ask("who")["parent"] == 1
        for _ in range(3):
            client.say("orphan")
            assert client.hear()
    # The workers, and neither orphans nor zombies.
    container.wait_until(lambda: len(first.children()) == 2)
    assert psutil.STATUS_ZOMBIE not in [child.status() for child in first.children()]
    with (
        Load(port, LOUD, first_generation=3) as load,
        Client(("127.0.0.1", port)) as client,
        Client(("127.0.0.1", port)) as late,
    ):
        client.say("slow 4 patience")
        # So that it is there before the signal is.
        assert late.ask("who")["generation"] == 3
        first.send_signal(signal.SIGTERM)
        # At once, and not when those who were there before have been served.
        container.wait_until(lambda: load.counts.failures[Failure.REFUSED] > 0)
        assert container.process.poll() is None
        assert client.hear() == "3 patience bye"
        late.close()
        assert container.process.wait(PATIENCE_SECONDS) == 0
    # Who comes after the end; and whoever came before it has an answer. Without CAP_NET_ADMIN a kernel may let some in
    # until the last worker has looked.
    late_ones = load.counts.failures[Failure.RESET]
    assert load.counts.failures.total() == load.counts.failures[Failure.REFUSED] + late_ones
    assert late_ones <= (3 if kind == "runc" else 0)


def test_a_start_that_fails_shows_in_the_status_of_the_container(kind: str, tmp_path: Path, port: int) -> None:
    options = [f"--app-dir={APP}", f"--bind=127.0.0.1:{port}", "--control=off"]
    with running(kind, tmp_path, [*COMMAND, "run", "app:main", *options], BROKEN="1") as container:
        assert container.process.wait() == 3
        assert "a broken release" in container.log.read_text()


def test_the_dockerfile_runs_what_its_last_line_says(kind: str, tmp_path: Path, port: int) -> None:
    lines = dockerfile.parse_file(str(PROJECT / "examples" / "Dockerfile"))
    assert next(line.value for line in lines if line.cmd == "STOPSIGNAL") == ("SIGTERM",)
    # As a list: a shell in between would be PID 1, and pass no signal on.
    assert (lines[-1].cmd, lines[-1].json) == ("CMD", True)
    program, *arguments = lines[-1].value
    assert program == "ecdysis"
    # The target and the ports are the example's; all else is run as it stands.
    health = find_free_port()
    places = {"app:app": "app:main", "0.0.0.0:8000": f"127.0.0.1:{port}", "0.0.0.0:8001": f"127.0.0.1:{health}"}
    assert set(places) < set(arguments)
    (tmp_path / "run").mkdir(mode=0o700)
    variables = dict(
        zip(*[iter(value for line in lines if line.cmd == "ENV" for value in line.value)] * 2, strict=False)
    )
    assert set(variables) == {"RUNTIME_DIRECTORY"}
    command = shlex.join([*COMMAND, *(places.get(argument, argument) for argument in arguments)])
    with running(
        kind,
        tmp_path,
        ["sh", "-c", f"cd {APP} && exec {command}"],
        ADDRESS=f"127.0.0.1:{port}",
        RUNTIME_DIRECTORY=str(tmp_path / "run"),
    ) as container:
        container.wait_until(lambda: "1 worker" in container.log.read_text())
        with Client(("127.0.0.1", port)) as client:
            assert client.ask("who")["parent"] == 1
        with urllib.request.urlopen(f"http://127.0.0.1:{health}/ready") as answer:
            assert answer.status == 200
        # As the engine does it, and `docker exec`.
        kind_of_check, *words = next(line.value for line in lines if line.cmd == "HEALTHCHECK")
        assert kind_of_check == "CMD"
        environment = {**os.environ, "RUNTIME_DIRECTORY": str(tmp_path / "run")}
        for program, *arguments in (words, ["ecdysis", "restart"]):
            assert program == "ecdysis"
            subprocess.run([*COMMAND, *arguments], check=True, cwd=PROJECT, env=environment, stdout=subprocess.DEVNULL)
        with Client(("127.0.0.1", port)) as client:
            assert client.ask("who")["generation"] == 2
        assert container.stop() == 0
