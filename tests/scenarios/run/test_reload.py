"""``--reload``: a file that is saved restarts the service, and no request is lost over it."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from tests.scenarios.run.commands import Visitors, get, running, wait_until, write_app

pytestmark = pytest.mark.main_python_only

OPTIONS = ("--bind", "127.0.0.1:0", "--reload", "--drain-timeout", "5", "--log-level", "debug")
RESTARTED = r"the restart begins"


def find_watcher(pid: int) -> psutil.Process:
    [watcher] = [child for child in psutil.Process(pid).children() if "ecdysis_async.cli.reload" in child.cmdline()]
    return watcher


def test_saving_restarts(tmp_path: Path) -> None:
    """A save, saves in a row, one that is broken, one in the middle of a restart: and each request is answered."""
    path = tmp_path / "main.py"
    write_app(path, "one")
    with running(tmp_path, *OPTIONS) as run, Visitors(run.find_port()) as visitors:
        run.wait_for("watching ")
        watcher = find_watcher(run.process.pid)
        write_app(path, "two")
        visitors.wait_for("two")
        run.wait_for(r"the restart is settled", 1)
        # A broken one: what is wrong is told, and the code before serves.
        path.write_text("app = (\n", encoding="utf-8")
        run.wait_for("the code before goes on serving: .*SyntaxError: '\\(' was never closed")
        visitors.wait_for("two")
        # Many at once are few restarts.
        before = len(run.log.split("the restart begins")) - 1
        for number in range(30):
            write_app(path, f"many {number}")
        visitors.wait_for("many 29")
        assert len(run.log.split("the restart begins")) - 1 - before <= 5
        # What is saved while a restart loads the file before it is not forgotten.
        write_app(
            path,
            "slow",
            "import os, time\nprint('it is loaded', flush=True)\n"
            f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)",
        )
        run.wait_for("it is loaded")
        write_app(path, "last")
        (tmp_path / "go").touch()
        visitors.wait_for("last")
        # What is no Python is nobody's business.
        restarts = run.log.count("the restart begins")
        (tmp_path / "data.json").write_text("{}", encoding="utf-8")
        write_app(path, "end")
        visitors.wait_for("end")
        assert run.log.count("the restart begins") == restarts + 1
        assert visitors.failures == []
    wait_until(lambda: not watcher.is_running(), "the watcher stays")


def test_a_saved_env_file_and_a_saved_configuration_restart(tmp_path: Path) -> None:
    write_app(tmp_path / "main.py", "unused", "import os\nTEXT = os.environ['ANSWER'].encode()")
    env_file, config = tmp_path / "settings.env", tmp_path / "settings.toml"
    env_file.write_text("ANSWER=one\n", encoding="utf-8")
    config.write_text(f'env-file = "{env_file}"\n', encoding="utf-8")
    with running(tmp_path, *OPTIONS, "--config", str(config)) as run:
        port = run.find_port()
        run.wait_for("watching ")
        assert get(port) == (200, "one")
        env_file.write_text("ANSWER=two\n", encoding="utf-8")
        wait_until(lambda: get(port) == (200, "two"), "it does not restart")
        run.wait_for("the restart is settled", 1)
        # A mistake in it is told, and changes nothing.
        config.write_text('no-such-option = "1"\n', encoding="utf-8")
        run.wait_for("the code before goes on serving")
        run.wait_for("there is no option 'no-such-option'")
        assert get(port) == (200, "two")


def test_the_watcher_dies_with_the_service(tmp_path: Path) -> None:
    write_app(tmp_path / "main.py", "one")
    with running(tmp_path, *OPTIONS) as run:
        run.find_port()
        run.wait_for("watching ")
        family = psutil.Process(run.process.pid).children(recursive=True)
        watcher = find_watcher(run.process.pid)
        run.process.send_signal(signal.SIGKILL)
        run.wait()
        wait_until(lambda: not watcher.is_running(), "the watcher stays")
        psutil.wait_procs(family, timeout=30)


def test_globs_and_files_that_the_service_writes(tmp_path: Path) -> None:
    """Templates are watched, what is left out is not, and a generator does not restart the service for ever."""
    make_stamp = "import pathlib, time\npathlib.Path('generated.py').write_text(f'STAMP = {time.time()}')"
    write_app(tmp_path / "main.py", "one", make_stamp)
    (tmp_path / "drafts").mkdir()
    options = ("--reload-include", "*.html", "--reload-exclude", "drafts")
    with running(tmp_path, *OPTIONS, *options) as run:
        port = run.find_port()
        run.wait_for("watching ")
        write_app(tmp_path / "main.py", "two", make_stamp)
        run.wait_for("the service itself changes generated.py at each start: .*--reload-exclude generated.py")
        restarts = run.log.count("generated.py changed: restarting")
        (tmp_path / "drafts" / "a.html").write_text("", encoding="utf-8")
        (tmp_path / "index.html").write_text("", encoding="utf-8")
        run.wait_for("index.html changed: restarting")
        write_app(tmp_path / "main.py", "three", make_stamp)
        wait_until(lambda: get(port) == (200, "three"), "it does not restart")
        assert run.log.count("generated.py changed: restarting") == restarts
        assert "drafts" not in run.log
