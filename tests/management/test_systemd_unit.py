"""What is wrong with a unit, as far as a process can know it, and the remedy that it is told."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ecdysis_async._management import systemd_unit
from ecdysis_async._management.systemd_unit import check_unit, find_shortcoming, forbid_restart


def test_a_unit_that_cannot_work_is_told_what_to_change(environment: Callable[..., None]) -> None:
    assert check_unit() is forbid_restart() is None
    environment(SYSTEMD_EXEC_PID=str(os.getpid()))
    assert "Type=notify" in (check_unit() or "")
    assert forbid_restart() == check_unit()
    environment(NOTIFY_SOCKET="@x")
    assert check_unit() is forbid_restart() is None
    environment(SYSTEMD_EXEC_PID="1")
    assert "NotifyAccess=all" in (check_unit() or "")
    assert forbid_restart() is None


OLD_SYSTEMD = """#!/bin/sh
case "$*" in
--version) echo "systemd VERSION (VERSION-1~deb12u1)"; echo "+PAM +AUDIT" ;;
"show --value --property=FileDescriptorStoreMax app.service") echo SIZE ;;
*) echo "what is $*?" >&2; exit 1 ;;
esac
"""


@pytest.mark.backends("asyncio")
@pytest.mark.parametrize(
    ("version", "size", "complains"), [(252, 16, True), (252, 0, False), (254, 16, False), ("rolling", 16, False)]
)
async def test_a_systemd_that_is_too_old_for_the_unit_is_told(
    environment: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str | int,
    size: int,
    *,
    complains: bool,
) -> None:
    command = tmp_path / "systemctl"
    command.write_text(OLD_SYSTEMD.replace("VERSION", str(version)).replace("SIZE", str(size)))
    command.chmod(0o755)
    environment(NOTIFY_SOCKET="@nobody", SYSTEMD_EXEC_PID=str(os.getpid()), PATH=f"{tmp_path}:{os.environ['PATH']}")
    # This machine runs another one, or none.
    monkeypatch.setattr(systemd_unit, "BOOTED", str(tmp_path))
    monkeypatch.setattr(systemd_unit, "_read_control_group", lambda: ["", "system.slice", "app.service"])
    complaint = await find_shortcoming(has_socket_unit=False)
    assert ("FileDescriptorStoreMax=16" in (complaint or "")) == complains
    assert await find_shortcoming(has_socket_unit=True) is None
    # One that tells of its store is new enough.
    environment(FDSTORE="16")
    assert await find_shortcoming(has_socket_unit=False) is None
