"""``ecdysis run --takeover``: another anchor goes on with a service and its sockets, and replaces its workers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ecdysis_async._anchor.takeover import Takeover, ask_for_service
from ecdysis_async.errors import TakeoverFailed
from tests.ports import find_free_port
from tests.scenarios.run.commands import (
    ECDYSIS,
    Visitors,
    call,
    get,
    make_environment,
    running,
    taking_over,
    wait_until,
    write_app,
)

pytestmark = pytest.mark.main_python_only

QUICK = ("--bind", "127.0.0.1:0", "--probation", "0.2", "--drain-timeout", "5")


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """Two directories with a release each."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_app(tmp_path / name / "main.py", name)
    return tmp_path / "one", tmp_path / "two"


def test_a_newcomer_goes_on(places: tuple[Path, Path]) -> None:
    """No request is lost, the control socket and the pid file stay where they are, and all workers are its own."""
    one, two = places
    pid_file = one / "pid"
    more = ("--workers", "2", "--pid-file", str(pid_file))
    with running(one, *QUICK, *more) as former:
        port, inode = former.find_port(), os.stat(former.control).st_ino
        with Visitors(port) as visitors:
            visitors.wait_for("one")
            with taking_over(former, two, *QUICK, *more) as newcomer:
                assert former.wait() == 0
                visitors.wait_for("two")
                newcomer.wait_for(f"taken over from pid {former.process.pid}: ")
                newcomer.wait_for("the restart is settled: generation 2")
                status = newcomer.status()
                assert (status["pid"], status["generation"]) == (newcomer.process.pid, 2)
                assert status["last_report"]["outcome"] == "settled"
                wait_until(lambda: len(newcomer.status()["workers"]) == 2, "former workers stay")
                workers = {each["pid"] for each in newcomer.status()["workers"]}
                assert {psutil.Process(pid).ppid() for pid in workers} == {newcomer.process.pid}
                assert os.stat(former.control).st_ino == inode
                assert pid_file.read_text(encoding="ascii").strip() == str(newcomer.process.pid)
                # From here on it is a service like any other.
                write_app(two / "main.py", "three")
                done = call("restart", "--control", former.control, cwd=two)
                assert done.returncode == 0, done.stderr
                visitors.wait_for("three")
                assert visitors.failures == []
                visitors.end()
    assert not os.path.exists(former.control)
    assert not pid_file.exists()


def test_a_release_that_does_not_start_changes_nothing(places: tuple[Path, Path]) -> None:
    one, two = places
    write_app(two / "main.py", "broken", "import nowhere")
    with running(one, *QUICK) as former:
        port = former.find_port()
        with taking_over(former, two, *QUICK) as newcomer:
            assert newcomer.wait() == 3
            assert "No module named 'nowhere'" in newcomer.log
            assert "the new release fails its check" in newcomer.log
        assert get(port) == (200, "one")
        assert former.status()["pid"] == former.process.pid


def test_a_wrong_option_ends_a_newcomer_as_a_wrong_command(places: tuple[Path, Path]) -> None:
    """A worker alone knows the options of its server: its refusal is a wrong use of the command all the same."""
    one, two = places
    with running(one, *QUICK) as former:
        port = former.find_port()
        with taking_over(former, two, *QUICK, "--server-option", "timeout_keep_alve=3") as newcomer:
            assert newcomer.wait() == 2
        assert newcomer.log.count("did you mean 'timeout_keep_alive'?") == 1
        assert get(port) == (200, "one")
        assert former.status()["pid"] == former.process.pid


def test_a_service_that_dies_before_it_hands_over_is_followed(places: tuple[Path, Path]) -> None:
    """It is killed while the newcomer still tries its release: the newcomer starts in its place."""
    one, two = places
    port = find_free_port()
    options = ("--bind", f"127.0.0.1:{port}", *QUICK[2:])
    gate = two / "gate"
    os.mkfifo(gate)
    # The check imports it, and waits.
    write_app(two / "main.py", "two", f"import os\nif os.path.exists({str(gate)!r}): open({str(gate)!r}).read()")
    with running(one, *options) as former:
        former.find_port()
        with taking_over(former, two, *options) as newcomer:
            # It is opened once the newcomer's check reads it, which goes on when it is closed.
            with gate.open("w", encoding="ascii"):
                former.process.kill()
                former.process.wait()
                gate.unlink()
            newcomer.wait_for("has died before it handed over: this one starts in its place")
            newcomer.wait_for("serving on")
            assert get(port) == (200, "two")
            assert newcomer.status()["pid"] == newcomer.process.pid


def test_who_dies_with_the_state_in_hand_is_not_waited_for(places: tuple[Path, Path]) -> None:
    one, _ = places
    with running(one, *QUICK) as former:
        port = former.find_port()
        program = f"from ecdysis_async._anchor.takeover import ask_for_service; ask_for_service({former.control!r})"
        subprocess.run([sys.executable, "-c", program], env=make_environment(one, {}), timeout=60, check=True)
        wait_until(lambda: get(port) == (200, "one"), "it does not go on")
        assert former.status()["pid"] == former.process.pid
        done = call("restart", "--control", former.control, cwd=one)
        assert done.returncode == 0, done.stderr


def test_a_newcomer_that_is_silent_holds_nobody_up(places: tuple[Path, Path]) -> None:
    """Load balancers and commands are answered meanwhile, and in the end the service may be restarted again."""
    one, _ = places
    health = one / "health"
    with running(one, *QUICK, "--health-bind", f"unix:{health}") as former:
        port = former.find_port()
        succession = ask_for_service(former.control)
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(health))
                client.sendall(b"GET /live HTTP/1.1\r\n\r\n")
                assert client.recv(12) == b"HTTP/1.1 200"
            assert former.status()["waiting_for"] == "the new anchor to take over"
            assert get(port) == (200, "one")
            former.wait_for("not taken over, and goes on: .* it was silent for 10 seconds")
            with pytest.raises(TakeoverFailed, match="goes on"):
                succession.confirm()
        finally:
            for descriptor in descriptors_of(succession):
                os.close(descriptor)
        done = call("restart", "--control", former.control, cwd=one)
        assert done.returncode == 0, done.stderr


def test_a_newcomer_that_cannot_open_everything_changes_nothing(places: tuple[Path, Path]) -> None:
    one, two = places
    with running(one, *QUICK) as former:
        port = former.find_port()
        missing = str(two / "missing" / "pid")
        with taking_over(former, two, *QUICK, "--pid-file", missing) as newcomer:
            assert newcomer.wait() == 3
            assert f"the pid file {missing} cannot be written" in newcomer.log
        former.wait_for("the service was not taken over, and goes on")
        assert get(port) == (200, "one")
        assert former.status()["pid"] == former.process.pid


def descriptors_of(succession: Takeover) -> list[int]:
    state = succession.state
    found = [each[key] for each in state["crew"]["workers"] for key in ("pidfd", "line")]
    found += [number for sockets in state["sockets"].values() for number in sockets["descriptors"]]
    return [*found, state["signals"], state["lock_file"]]


@pytest.mark.parametrize("lives", [True, False], ids=["it lives", "it dies"])
def test_the_last_word_is_missing(places: tuple[Path, Path], *, lives: bool) -> None:
    """A newcomer that has everything but the last word begins over the former one's dead body, and in no other case."""
    one, _ = places
    with running(one, *QUICK) as former:
        former.find_port()
        workers = [psutil.Process(each["pid"]) for each in former.status()["workers"]]
        succession = ask_for_service(former.control)
        try:
            if lives:
                # It has waited for long enough, and goes on.
                former.wait_for("not taken over, and goes on")
                with pytest.raises(TakeoverFailed, match="goes on"):
                    succession.confirm()
            else:
                former.process.send_signal(signal.SIGKILL)
                former.wait()
                succession.confirm()
                # Its workers have not noticed: their lines are held.
                assert all(each.is_running() for each in workers)
        finally:
            for descriptor in descriptors_of(succession):
                os.close(descriptor)
        if not lives:
            psutil.wait_procs(workers, timeout=30)
            assert not any(each.is_running() for each in workers)
            os.unlink(former.control)


def test_who_cannot_be_taken_over(places: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = places
    missing = str(tmp_path / "missing")
    done = call("run", "main:app", *QUICK, "--takeover", missing, cwd=two)
    assert (done.returncode, done.stdout) == (3, "")
    assert f"ecdysis: there is no service to take over: {missing}: No such file or directory." in done.stderr
    with running(one, *QUICK) as former:
        former.find_port()
        plain = f"async def main():\n async with ecdysis_async.Ecdysis(takeover={former.control!r}): pass\n"
        done_plain = subprocess.run(
            [sys.executable, "-c", f"import ecdysis_async\n{plain}ecdysis_async.run(main)"],
            env=make_environment(one, {}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done_plain.returncode == 1
        assert "can be taken over by `ecdysis run --takeover` alone" in done_plain.stderr


def test_a_plain_service_has_no_anchor(places: tuple[Path, Path]) -> None:
    one, two = places
    control = str(one / "plain")
    program = (
        "import ecdysis_async\n"
        "async def main():\n"
        f"    async with ecdysis_async.Ecdysis(control_socket={control!r}) as ecdysis:\n"
        "        await ecdysis.serve_forever()\n"
        "ecdysis_async.run(main)\n"
    )
    (one / "plain.py").write_text(program, encoding="utf-8")
    process = subprocess.Popen([sys.executable, "plain.py"], cwd=one, env=make_environment(one, {}))
    try:
        wait_until(lambda: call("status", "--control", control, cwd=one).returncode == 0, "it does not serve")
        done = subprocess.run(
            [*ECDYSIS, "run", "main:app", *QUICK, "--control", "off", "--takeover", control],
            cwd=two,
            env=make_environment(two, {}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 3
        assert "this service has no anchor" in done.stderr
    finally:
        process.terminate()
        assert process.wait(60) == 0
