"""``ecdysis check`` and ``ecdysis restart --check``: what they tell of a release, and that nothing of it is served."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.scenarios.run.commands import call, get, running, write_app

pytestmark = pytest.mark.main_python_only

SECRET = "correct horse battery staple"

# What its start-up would do; a check never comes so far.
BIND = ("--bind", "127.0.0.1:0")


@pytest.fixture
def releases(tmp_path: Path) -> Path:
    """Two releases, and ``current``, which leads to the first one."""
    for number in ("1", "2"):
        directory = tmp_path / "releases" / number
        directory.mkdir(parents=True)
        write_app(directory / "main.py", number)
    (tmp_path / "current").symlink_to("releases/1")
    return tmp_path


def deploy(releases: Path, number: str) -> None:
    draft = releases / "draft"
    draft.symlink_to(f"releases/{number}")
    os.replace(draft, releases / "current")


def check(*arguments: str, cwd: Path, **environment: str) -> Any:
    done = call("check", "main:app", *arguments, "--json", cwd=cwd, **environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)["comparison"]


def test_where_no_service_runs(releases: Path) -> None:
    current = releases / "current"
    control = str(releases / "control")
    done = call("check", "main:app", *BIND, "--control", control, cwd=current)
    assert (done.returncode, done.stderr) == (0, "")
    assert "  service      none runs there: this is a first start\n" in done.stdout
    assert "  target       main:app by uvicorn\n" in done.stdout
    assert f"  directory    {current} -> {releases}/releases/1\n" in done.stdout
    assert done.stdout.endswith("  sockets      tcp:127.0.0.1:0\n")
    found = check(*BIND, "--control", control, cwd=current)
    assert (found["sockets"], found["environment"]) == (["tcp:127.0.0.1:0"], None)
    # Nothing was opened, and nothing is left.
    assert sorted(os.listdir(releases)) == ["current", "releases"]


def test_what_a_restart_would_change(releases: Path) -> None:
    """Beside a running service: links that moved, names of the environment, sockets; and no value of anything."""
    current, env_file = releases / "current", releases / "env"
    gone = releases / "gone.sock"
    env_file.write_text(f"KEPT=1\nLEFT=2\nTOKEN={SECRET}\n", encoding="utf-8")
    options = ("--env-file", str(env_file), *BIND)
    with running(current, *options, "--bind", f"unix:{gone}", directory=releases) as run:
        port = run.find_port()
        more = ("--control", run.control)
        found = check(*options, "--bind", f"unix:{gone}", *more, cwd=current)
        assert (found["pid"], found["process"]) == (run.process.pid, found["former_process"])
        assert found["environment"] == {"added": [], "removed": [], "changed": []}
        deploy(releases, "2")
        env_file.write_text(f"KEPT=1\nTOKEN={SECRET}, longer\nNEW={SECRET}\n", encoding="utf-8")
        new = releases / "new.sock"
        done = call("check", "main:app", *options, "--bind", f"unix:{new}", *more, "--json", cwd=current)
        found = json.loads(done.stdout)["comparison"]
        assert found["environment"] == {"added": ["NEW"], "removed": ["LEFT"], "changed": ["TOKEN"]}
        assert found["sockets"] == {"kept": ["tcp:127.0.0.1:0"], "added": [f"unix:{new}"], "removed": [f"unix:{gone}"]}
        assert found["process"]["directory"] == f"{releases}/releases/2"
        assert found["former_process"]["directory"] == f"{releases}/releases/1"
        text = call("check", "main:app", *options, "--bind", f"unix:{new}", *more, cwd=current).stdout
        assert f"  directory    {current} -> {releases}/releases/2\n" in text
        assert "  environment  added: NEW\n               removed: LEFT\n               changed: TOKEN\n" in text
        assert SECRET not in done.stdout + text + run.log
        assert not new.exists()
        assert get(port) == (200, "1")
        # The service itself starts what it would start: with its own command line, and through the link.
        restarted = call("restart", "--check", "--until", "serving", *more, cwd=releases)
        assert restarted.returncode == 0, restarted.stderr
        assert (
            "  environment  added: NEW\n               removed: LEFT\n               changed: TOKEN\n"
            in restarted.stdout
        )
        assert f"  sockets      kept: tcp:127.0.0.1:0, unix:{gone}\n" in restarted.stdout
        assert "serves: serving" in restarted.stdout
        assert get(port) == (200, "2")


def test_a_release_that_does_not_pass(releases: Path) -> None:
    current = releases / "current"
    with running(current, *BIND, directory=releases) as run:
        port = run.find_port()
        write_app(releases / "releases/1/main.py", "broken", "import nowhere")
        for done in (
            call("check", "main:app", *BIND, "--control", run.control, cwd=current),
            call("restart", "--check", "--control", run.control, cwd=current),
        ):
            assert done.returncode == 1
            assert "the new release fails its check: it has ended with exit status 3" in done.stderr
        assert run.log.count("No module named 'nowhere'") >= 1
        # What no restart could start passes no check, though its files are still where the service was started.
        current.unlink()
        done = call("restart", "--check", "--control", run.control, cwd=releases)
        assert done.returncode == 1
        assert f"the directory {current}, in which the service was started, is gone: put it back" in done.stderr
        assert "the restart begins" not in run.log
        assert get(port) == (200, "1")
        assert run.status()["last_report"] is None


def test_what_is_wrong_with_the_options(releases: Path) -> None:
    done = call("check", "main:app", "--nonsense", cwd=releases / "current")
    assert done.returncode == 2
    assert "No such option" in done.stderr
    assert call("check", "main", cwd=releases / "current").returncode == 2
    for server, told in ("uvicorn", "did you mean 'timeout_keep_alive'?"), ("hypercorn", "hypercorn has no option"):
        options = ("--server", server, "--server-option", "timeout_keep_alve=3")
        done = call("check", "main:app", *options, cwd=releases / "current")
        assert done.returncode == 2
        assert told in done.stderr
    done = call("check", "main:app", "--timeout", "nan", cwd=releases / "current")
    assert (done.returncode, done.stderr) == (2, "ecdysis: --timeout: a number of seconds above 0 is needed, not nan\n")
