"""Lame duck: a service that was told to stop goes on for a while, and tells load balancers to look elsewhere."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from tests.ports import find_free_port
from tests.scenarios.run.commands import PROJECT, Visitors, call, get, make_environment, running, wait_until, write_app

pytestmark = pytest.mark.main_python_only

MANIFEST = PROJECT / "examples" / "kubernetes.yaml"


@pytest.fixture
def health(tmp_path: Path) -> int:
    """Return a port for the health endpoints, which tell nobody where they are."""
    write_app(tmp_path / "main.py", "ok")
    return find_free_port()


def ask(port: int, path: str) -> tuple[int, str] | None:
    try:
        return get(port, path)
    except OSError:
        return None


def test_it_serves_on_and_is_not_ready(tmp_path: Path, health: int) -> None:
    options = ["--bind", "127.0.0.1:0", "--health-bind", f"127.0.0.1:{health}"]
    options += ["--lame-duck", "1000", "--probation", "1000"]
    with running(tmp_path, *options) as run:
        # It lives before it is ready.
        wait_until(lambda: ask(health, "/live") == (200, "alive\n"), "it is not alive")
        with Visitors(run.find_port()) as visitors:
            visitors.wait_for("ok")
            wait_until(lambda: ask(health, "/ready") == (200, "ready\n"), "it is not ready")
            assert call("restart", "--until", "serving", "--control", run.control, cwd=tmp_path).returncode == 0
            run.process.terminate()
            wait_until(lambda: ask(health, "/ready") == (503, "the service is about to stop\n"), "it is ready")
            assert ask(health, "/live") == (200, "alive\n")
            visitors.wait_for("ok")
            status = run.status()
            assert (status["state"], status["waiting_for"][:14]) == ("serving", "load balancers")
            assert status["stopping"]["phase"] == "lame duck"
            refused = call("restart", "--control", run.control, cwd=tmp_path)
            assert (refused.returncode, refused.stderr) == (
                3,
                "ecdysis: the service is being stopped: start it again once it has ended\n",
            )
            # And the probation goes on as it did.
            assert run.status()["restart"]["id"] == status["restart"]["id"]
            visitors.wait_for("ok")
            assert visitors.failures == []
        # A second signal ends the waiting, and hurries nobody.
        run.process.terminate()
        assert run.wait() == 0
        assert "the deadline of the drain is now" not in run.log


def test_it_stops_when_the_time_is_over(tmp_path: Path) -> None:
    write_app(tmp_path / "main.py", "ok")
    with running(tmp_path, "--bind", "127.0.0.1:0", "--lame-duck", "0.5") as run:
        run.find_port()
        run.process.terminate()
        assert run.wait() == 0
        assert "stopping in 0.5 seconds" in run.log


def test_a_stop_by_command_waits_for_nobody(tmp_path: Path) -> None:
    write_app(tmp_path / "main.py", "ok")
    with running(tmp_path, "--bind", "127.0.0.1:0", "--lame-duck", "1000") as run:
        run.find_port()
        assert call("stop", "--control", run.control, cwd=tmp_path).returncode == 0
        assert run.wait() == 0


def test_a_reload_by_signal_that_is_refused_is_answered(tmp_path: Path) -> None:
    """Otherwise `systemctl reload` of a Type=notify-reload unit would hang until its timeout."""
    write_app(tmp_path / "main.py", "ok")
    path, said = str(tmp_path / "notify"), []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)

        def listen() -> None:
            while message := manager.recv(65536):
                said.append(message.decode())

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            with running(tmp_path, "--bind", "127.0.0.1:0", "--lame-duck", "1000", NOTIFY_SOCKET=path) as run:
                run.find_port()
                wait_until(lambda: "READY=1" in said, "it does not say that it serves")
                run.process.terminate()
                wait_until(lambda: str(run.status()["waiting_for"]).startswith("load balancers"), "it is no lame duck")
                said.clear()
                run.process.send_signal(signal.SIGHUP)
                wait_until(lambda: "READY=1" in said, "the signal is not answered")
                (reloading,) = [each for each in said[: said.index("READY=1")] if each.startswith("RELOADING=1\n")]
                assert "\nMONOTONIC_USEC=" in reloading
                run.process.terminate()
                assert run.wait() == 0
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
                last.sendto(b"", path)
            thread.join()


# The manifest


def read_manifest() -> list[Any]:
    return list(yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8")))


def read_options() -> dict[str, str]:
    """Return the options of the command in the manifest."""
    [container] = read_manifest()[0]["spec"]["template"]["spec"]["containers"]
    assert container["command"][:3] == ["ecdysis", "run", "main:app"]
    return dict(option.removeprefix("--").split("=") for option in container["command"][3:])


def test_the_manifest_is_valid() -> None:
    """By the schemas of Kubernetes itself, with no field that they do not know."""
    for document in read_manifest():
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    wrong = read_manifest()[0]
    wrong["spec"]["template"]["spec"]["terminationGracePeriod"] = 60
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_its_times_fit_together() -> None:
    pod = read_manifest()[0]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    options, probe = read_options(), container["readinessProbe"]
    lame_duck, drain = float(options["lame-duck"]), float(options["drain-timeout"])
    # Whoever asks /ready has learnt of the end, and has had as long again to tell others.
    learnt = probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]
    assert lame_duck >= 2 * learnt
    # After the drain, the application has its own clean-up.
    assert pod["terminationGracePeriodSeconds"] >= lame_duck + drain + 10
    assert "preStop" not in MANIFEST.read_text(encoding="utf-8").split("apiVersion", 1)[1]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert options["bind"] == f"0.0.0.0:{ports['http']}"
    assert options["health-bind"] == f"0.0.0.0:{ports['health']}"
    paths = [container[kind]["httpGet"]["path"] for kind in ("readinessProbe", "livenessProbe")]
    assert paths == ["/ready", "/live"]


def test_its_command_runs(tmp_path: Path, health: int) -> None:
    """With all of its options, and with others' ports: those of the manifest are a container's own."""
    options = {**read_options(), "bind": "127.0.0.1:0", "health-bind": f"127.0.0.1:{health}"}
    process = subprocess.Popen(
        [os.path.join(os.path.dirname(sys.executable), "ecdysis"), "run", "main:app"]
        + [f"--{name}={value}" for name, value in options.items()],
        cwd=tmp_path,
        env=make_environment(tmp_path, {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: ask(health, "/ready") == (200, "ready\n"), "it is not ready")
        process.terminate()
        wait_until(lambda: (ask(health, "/ready") or [0])[0] == 503, "it is ready")
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
