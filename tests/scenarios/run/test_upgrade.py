"""``ecdysis restart --anchor`` tries what a changed configuration needs, before anything changes."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.scenarios.run.commands import Running, call, get, running, wait_until, write_app

pytestmark = pytest.mark.newest_python_only

Configure = Callable[..., None]


@pytest.fixture
def taken() -> Iterator[str]:
    """An address that another program has."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield f"127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[Running, Configure]]:
    """A service, and what writes its configuration file."""
    write_app(tmp_path / "main.py", "one")

    def configure(**options: object) -> None:
        known = {"bind": ["127.0.0.1:0"], "probation": 0.2, "drain-timeout": 5, "pid-file": str(tmp_path / "pid")}
        lines = [f"{key} = {json.dumps(value)}" for key, value in {**known, **options}.items()]
        (tmp_path / "config.toml").write_text("\n".join(lines), encoding="utf-8")

    configure()
    with running(tmp_path, "--config", "config.toml") as found:
        found.find_port()
        yield found, configure


def test_what_cannot_work_is_refused_and_changes_nothing(
    service: tuple[Running, Configure], taken: str, tmp_path: Path
) -> None:
    run, configure = service
    port = run.find_port()
    nowhere = f"{tmp_path}/nowhere/file"
    for options, complaint in (
        ({"pid-file": nowhere}, f"the pid file {nowhere} cannot be written"),
        ({"pid-file": str(tmp_path)}, "a directory is there"),
        ({"health-bind": taken}, f"cannot bind {taken}: Address already in use"),
        ({"bind": ["127.0.0.1:0", taken]}, f"cannot bind {taken}: Address already in use"),
        ({"bind": [f"unix:{nowhere}"]}, "the directory does not exist"),
        ({"log-config": nowhere}, "log-config: there is no file"),
        ({"workers": "many"}, "workers"),
    ):
        configure(**options)
        done = call("restart", "--anchor", "--control", run.control, cwd=tmp_path)
        assert done.returncode == 1, (options, done)
        assert "the anchor goes on as it is: " in done.stderr
        assert complaint in done.stderr
        assert run.status()["anchor"] == {"upgrades": 0, "error": None, "missing": {}}
        assert get(port) == (200, "one")
    configure(workers=2)
    done = call("restart", "--anchor", "--control", run.control, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert run.status()["anchor"] == {"upgrades": 1, "error": None, "missing": {}}
    wait_until(lambda: len(run.status()["workers"]) == 2, "it has not read its configuration")
    assert get(port) == (200, "one")


def test_a_first_start_leaves_nothing(taken: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    write_app(tmp_path / "main.py", "one")
    options = {
        "--control": f"{tmp_path}/run/control",
        "--pid-file": f"{tmp_path}/run/pid",
        "--health-bind": f"unix:{tmp_path}/run/health",
    }
    given = [word for pair in options.items() for word in pair]
    binds = ["--bind", f"unix:{tmp_path}/run/web", "--bind", taken]
    done = call("run", "main:app", *given, *binds, cwd=tmp_path)
    assert done.returncode == 3
    assert f"cannot bind {taken}: Address already in use" in done.stderr
    assert list((tmp_path / "run").iterdir()) == []
