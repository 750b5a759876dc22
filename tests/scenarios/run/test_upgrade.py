"""``ecdysis restart --anchor`` tries what a changed configuration needs, before anything changes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.scenarios.run.commands import PATIENCE_SECONDS, PROJECT, Running, call, get, running, wait_until, write_app

pytestmark = pytest.mark.main_python_only

Configure = Callable[..., None]

# Python imports it at its start: in the process that was executed, before that has read or opened anything.
IN_BETWEEN = """
import os, shutil
if "ECDYSIS_ANCHOR" in os.environ:
    os.unlink("config.toml")
    shutil.rmtree("new", ignore_errors=True)
"""
LOGGING = """
{"version": 1, "disable_existing_loggers": false, "root": {"handlers": ["all"], "level": "INFO"},
 "formatters": {"own": {"format": "anew: %(message)s"}},
 "handlers": {"all": {"class": "logging.StreamHandler", "formatter": "own"}}}
"""

# Python imports it at its start: in the process that was executed, before that has read or opened anything.
IN_BETWEEN = """
import os, shutil
if "ECDYSIS_ANCHOR" in os.environ and "ECDYSIS_ANCHOR_CHECK" not in os.environ:
    for path in ("config.toml", "new"):
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif os.path.exists(path):
            os.unlink(path)
"""
LOGGING = """{"version": 1, "disable_existing_loggers": false, "root": {"handlers": ["all"], "level": "INFO"},
"formatters": {"own": {"format": "anew: %(message)s"}},
"handlers": {"all": {"class": "logging.StreamHandler", "formatter": "own"}}}"""


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


def test_what_breaks_between_the_check_and_the_exec_ends_nothing(tmp_path: Path) -> None:
    """The file of the options is gone, and so is the new place of three others: former ones stay, and then it heals."""
    write_app(tmp_path / "main.py", "one")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(IN_BETWEEN, encoding="utf-8")
    new = tmp_path / "new"

    def make_place() -> None:
        new.mkdir(mode=0o700)
        (new / "logging.json").write_text(LOGGING, encoding="utf-8")

    def configure(**places: str) -> None:
        values = {"control": f"{tmp_path}/control", "health-bind": f"unix:{tmp_path}/health", "pid-file": "pid"}
        lines = [f"{key} = {json.dumps(value)}" for key, value in {**values, **places}.items()]
        (tmp_path / "config.toml").write_text("\n".join(lines), encoding="utf-8")

    options = ("--config", "config.toml", "--bind", "127.0.0.1:0", "--probation", "0.2")
    path = f"{PROJECT}{os.pathsep}{tmp_path / 'site'}"
    configure()
    with running(tmp_path, *options, says_control=False, PYTHONPATH=path) as run:
        port = run.find_port()
        done = call("restart", "--anchor", "--control", run.control, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), done
        assert not (tmp_path / "config.toml").exists()
        assert run.status()["anchor"] == {"upgrades": 1, "error": None, "missing": {}}

        make_place()
        moved = {"control": f"{new}/control", "health-bind": f"unix:{new}/health", "pid-file": f"{new}/pid"}
        configure(**moved, **{"log-config": f"{new}/logging.json"})
        done = call("restart", "--anchor", "--control", run.control, cwd=tmp_path)
        assert done.returncode == 0, done
        missing = run.status()["anchor"]["missing"]
        places = {f"the control socket {new}/control", f"the health address unix:{new}/health"}
        assert set(missing) == {*places, f"the pid file {new}/pid", "the logging of --log-config"}
        for what in missing:
            assert f"it goes on without {what}, which it tries again: " in done.stderr
        assert is_live(tmp_path / "health")
        assert get(port) == (200, "one")

        make_place()
        run.wait_for("anew: .*the control socket .* could be opened, and is there again")
        run.control = f"{new}/control"
        wait_until(lambda: run.status()["anchor"]["missing"] == {}, "it does not heal")
        assert is_live(new / "health")
        # What former code had is given up only now.
        former = [tmp_path / name for name in ("control", "health")]
        wait_until(lambda: not any(path.exists() for path in former), "the former sockets stay")
        assert (new / "pid").read_text(encoding="ascii").strip() == str(run.process.pid)
        assert get(port) == (200, "one")


def is_live(health: Path) -> bool:
    """Say whether a health address answers."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as client:
        client.settimeout(PATIENCE_SECONDS)
        client.connect(str(health))
        client.sendall(b"GET /live HTTP/1.1\r\n\r\n")
        return client.recv(12) == b"HTTP/1.1 200"


def test_commands_are_led_to_a_control_socket_that_moves(tmp_path: Path) -> None:
    write_app(tmp_path / "main.py", "one")
    config = tmp_path / "config.toml"
    config.write_text(f'control = "{tmp_path}/control"\nbind = ["127.0.0.1:0"]', encoding="utf-8")
    (tmp_path / "new").mkdir(mode=0o700)
    with running(tmp_path, "--config", "config.toml", says_control=False) as run:
        run.find_port()
        config.write_text(f'control = "{tmp_path}/new/control"\nbind = ["127.0.0.1:0"]', encoding="utf-8")
        done = call("restart", "--anchor", "--control", run.control, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), done
        assert f"its control socket is {tmp_path}/new/control now" in done.stdout
        run.control = f"{tmp_path}/new/control"
        assert run.status()["anchor"] == {"upgrades": 1, "error": None, "missing": {}}


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
