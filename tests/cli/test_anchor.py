"""How an anchor comes to be, of what `ecdysis run` was told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ecdysis_async._anchor import reexec
from ecdysis_async._anchor.anchor import STARTUP_FAILED
from ecdysis_async._anchor.config import AnchorConfig, HealthPage
from ecdysis_async._anchor.reload import Watched
from ecdysis_async._anchor.state import AnchorState
from ecdysis_async._config.options import Options
from ecdysis_async._sockets.addresses import Internet
from ecdysis_async._sockets.registry import Registry
from ecdysis_async._system.claims import ANCHOR_CHECK_MARKER
from ecdysis_async.cli import anchor
from ecdysis_async.cli.anchor import RELOAD_PROBATION_SECONDS, make_config, serve

SOCKETS: dict[str, dict[str, list[int]]] = {
    name: {"descriptions": [], "descriptors": []} for name in ("service", "control", "health")
}


def test_what_was_said_is_what_is_run(tmp_path: Path) -> None:
    (tmp_path / "env").touch()
    options = Options(
        target="main:app",
        workers=3,
        probation=7.0,
        drain_timeout=8.0,
        ready_timeout=9.0,
        hang_timeout=10.0,
        max_requests=11,
        max_requests_jitter=12,
        max_rss=13,
        lame_duck=14.0,
        health_bind=Internet("127.0.0.1", 9000),
        metrics=True,
        metrics_dir="auto",
        pid_file=str(tmp_path / "pid"),
        env_file=str(tmp_path / "env"),
    )
    config = make_config(options, "/run/control")
    settings = config.settings
    assert (config.workers, config.control_path, config.takeover) == (3, "/run/control", None)
    assert (settings.probation, settings.drain_timeout, settings.ready_timeout) == (7, 8, 9)
    assert (config.hang_timeout, config.max_requests, config.max_requests_jitter) == (10, 11, 12)
    assert (config.max_rss, config.lame_duck, config.is_checked_first) == (13, 14, True)
    assert (settings.pid_file, settings.env_file) == (tmp_path / "pid", tmp_path / "env")
    assert (config.pages, config.metrics_dir) == (frozenset({HealthPage.METRICS}), "auto")
    assert config.reload is None


def test_who_saves_a_file_again_does_not_wait(tmp_path: Path) -> None:
    env = str(tmp_path / "env")
    Path(env).touch()
    options = Options(target="main:app", reload=True, app_dir=str(tmp_path), env_file=env, probation=10.0)
    config = make_config(options, None)
    assert config.settings.probation == RELOAD_PROBATION_SECONDS
    assert config.reload == Watched((str(tmp_path), env))
    assert make_config(Options(target="main:app", reload=True, probation=0.0), None).settings.probation == 0


def test_sockets_are_opened_that_were_asked_for() -> None:
    registry = Registry()
    try:
        # The first worker decides: an `async def main` may listen elsewhere.
        assert make_config(Options(target="main:app"), None).open_sockets == {}
        config = make_config(Options(target="main:app", bind=(Internet("127.0.0.1", 0),)), None)
        assert list(config.open_sockets) == ["127.0.0.1:0"]
        config.open_sockets["127.0.0.1:0"](registry)
        (entry,) = registry.entries
        assert entry.sock.getsockname()[0] == "127.0.0.1"
    finally:
        registry.close(unlink=True)


@pytest.mark.parametrize("is_readable", [True, False])
def test_new_code_says_whether_it_can_go_on(
    is_readable: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = AnchorConfig({})
    body, _ = AnchorState.fresh(config).describe()
    memory = reexec.seal({**body, "sockets": SOCKETS} if is_readable else {})
    found = os.fstat(memory)
    monkeypatch.setenv(ANCHOR_CHECK_MARKER, f"{memory}:{found.st_dev}:{found.st_ino}")
    assert serve(config) == (0 if is_readable else STARTUP_FAILED)
    written = capfd.readouterr().err
    assert written == "" if is_readable else "does not take over from the one that runs: KeyError('crew')" in written


def test_a_reload_without_a_control_socket_is_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(anchor, "configure_logging", lambda options: None)
    assert anchor.run(Options(target="main:app", reload=True, control="off")) == STARTUP_FAILED
    assert "give it one (--control PATH)" in capfd.readouterr().err
