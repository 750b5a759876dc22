"""An anchor from its start to its end, in this process; what whole services see of it is in tests/scenarios/anchor."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from ecdysis_async._anchor.anchor import STARTUP_FAILED, Anchor
from ecdysis_async._anchor.config import AnchorConfig
from ecdysis_async._sockets.addresses import Internet, Unix
from ecdysis_async._sockets.registry import Registry
from ecdysis_async.settings import Settings

PROJECT = Path(__file__).parents[2]

SERVES = """
import os, signal, sys
import ecdysis_async

async def main():
    async with ecdysis_async.Ecdysis() as ecdysis:
        listener = ecdysis.listen_tcp("127.0.0.1", 0, name="web")
        await ecdysis.ready()
        {then}
        await ecdysis.serve_forever()

ecdysis_async.run(main)
"""


def open_web(registry: Registry) -> None:
    registry.obtain(Internet("127.0.0.1", 0), name="web")


def make_config(tmp_path: Path, program: str, **more: object) -> AnchorConfig:
    settings = Settings(
        command=(sys.executable, "-c", program),
        pid_file=tmp_path / "pid",
        ready_timeout=60,
        drain_timeout=60,
    )
    config = functools.partial(
        AnchorConfig, {"web": open_web}, settings=settings, control_path=str(tmp_path / "control")
    )
    return config(systemd=False, **more)  # type: ignore[arg-type]


def run(config: AnchorConfig) -> int:
    """Run an anchor to its end, within a minute."""

    async def main() -> int:
        with anyio.fail_after(120):
            return await Anchor(config).run()

    return anyio.run(main)


def test_a_service_starts_and_stops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        # Each worker stops the whole service as soon as it serves.
        assert run(make_config(tmp_path, SERVES.format(then="ecdysis.stop()"), workers=2)) == 0
        assert signal.getsignal(signal.SIGTERM) == handler
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert f"[anchor, pid {os.getpid()}] the service has ended" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_a_signal_stops_it_and_one_more_does_not_change_the_status(tmp_path: Path) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert run(make_config(tmp_path, SERVES.format(then="os.kill(os.getppid(), signal.SIGTERM)"))) == 0
        assert {signal.getsignal(number) for number in handlers} == {signal.SIG_IGN}
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_first_worker_that_does_not_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(make_config(tmp_path, "raise SystemExit('not today')", workers=3)) == STARTUP_FAILED
    written = capfd.readouterr().err
    assert "ecdysis: the service does not start: worker 0 (pid " in written
    # The others are not tried.
    assert written.count("not today") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["pid file", "sockets"])
def test_what_cannot_be_opened_ends_the_start(what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing" / "file"
    config = make_config(tmp_path, "raise AssertionError")
    if what == "pid file":
        settings = Settings(pid_file=missing)
        config = AnchorConfig({"web": open_web}, settings=settings, systemd=False)
    else:

        def open_missing(registry: Registry) -> None:
            registry.obtain(Unix(str(missing)))

        config = AnchorConfig({"missing": open_missing}, systemd=False)
    assert run(config) == STARTUP_FAILED
    written = capfd.readouterr().err
    assert written.startswith("ecdysis: ")
    assert str(missing) in written
    assert list(tmp_path.iterdir()) == []


def test_it_imports_nothing_that_serves() -> None:
    """Neither `Ecdysis`, which the workers run, nor a server: an anchor shall stay small."""
    program = (
        "import sys, ecdysis_async.cli.commands, ecdysis_async.cli.anchor; "
        "sys.exit([name for name in sys.modules if name.startswith(('ecdysis_async._service', 'ecdysis_async.servers', "
        "'uvicorn', 'hypercorn', 'aiohttp', 'websockets', 'trio', 'uvloop'))] or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, stderr=subprocess.PIPE, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
