"""What is wrong with the unit that systemd runs this service in, as far as a process can know it."""

from __future__ import annotations

import contextlib
import os
import subprocess

from ecdysis_async._system.threads import run_in_thread

__all__ = ["check_unit", "find_shortcoming", "forbid_restart", "knows_descriptor_store"]

# The version of systemd since which a service is told that it has a descriptor store (FDSTORE=).
TELLS_OF_STORE = 254

# It exists where the machine runs systemd (sd_booted(3)).
BOOTED = "/run/systemd/system"

# How long systemctl may take, seconds.
ASK_SECONDS = 2.0


async def find_shortcoming(*, has_socket_unit: bool) -> str | None:
    """Return what the unit asks of a systemd that is too old for it, and what to do instead; None where it is not so.

    sd_notify(3) tells no version, and a systemd that does not understand a message says nothing. So systemctl is asked,
    where something may be amiss. That is so where systemd has executed this process, outside of a container, and has
    told of no descriptor store, as versions before 254 never do.

    Args:
        has_socket_unit: whether systemd itself listens, so that nothing has to be kept.
    """
    if has_socket_unit:
        return None
    is_executed = os.environ.get("SYSTEMD_EXEC_PID", str(os.getpid())) == str(os.getpid())
    if not (os.environ.get("NOTIFY_SOCKET") and is_executed) or "FDSTORE" in os.environ:
        return None
    if not os.path.isdir(BOOTED):  # noqa: ASYNC240 - it is in memory
        return None
    return await run_in_thread(_find_shortcoming, abandon_on_cancel=True)


def knows_descriptor_store() -> bool:
    """Say whether systemd tells a service of its descriptor store; it is taken for granted where there is none."""
    version = _find_version()
    return not version.isdecimal() or int(version) >= TELLS_OF_STORE


def _find_version() -> str:
    words = _ask_systemctl("--version").split()
    return words[1] if words[:1] == ["systemd"] and len(words) > 1 else ""


def _find_shortcoming() -> str | None:
    version = _find_version()
    if not version.isdecimal() or int(version) >= TELLS_OF_STORE:
        return None
    *slices, unit = _read_control_group() or [""]
    if not unit.endswith(".service"):
        return None
    manager = ["--user"] if any(each.startswith("user@") for each in slices) else []
    size = _ask_systemctl(*manager, "show", "--value", "--property=FileDescriptorStoreMax", unit).strip()
    if size in ("", "0"):
        return None
    return (
        f"systemd {version} is too old for FileDescriptorStoreMax={size}: a service is told of its descriptor store "
        f"since {TELLS_OF_STORE}, so nothing is kept there, and after a crash clients are refused until the next "
        "start. Take that line out, and let a socket unit listen (`ecdysis unit --socket`), which this one can do, too"
    )


def _ask_systemctl(*arguments: str) -> str:
    """Return what it says; "" where it is not there, or does not answer."""
    try:
        return subprocess.run(
            ["systemctl", *arguments],  # noqa: S607 - where it is, distributions do not agree
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            errors="replace",
            timeout=ASK_SECONDS,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _read_control_group() -> list[str]:
    """Return the path of this process' control group, down to the unit; none where it is in no such group."""
    with contextlib.suppress(OSError), open("/proc/self/cgroup", encoding="utf-8") as groups:
        for line in groups:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controllers in ("", "name=systemd") and ".service" in path:
                parts = path.split("/")
                while not parts[-1].endswith(".service"):
                    parts.pop()
                return parts
    return []


def forbid_restart() -> str | None:
    """Return why a restart would end the unit that this first generation runs in, and what to do; None if it would not.

    systemd itself has executed this process (SYSTEMD_EXEC_PID, systemd.exec(5), since 248), and has given it no socket.
    So this process cannot say that another one is the main process from now on. A unit that lives as long as any of its
    processes (ExitType=cgroup) would outlive that. A process cannot know it, but ``systemd=False`` says so.
    """
    if os.environ.get("SYSTEMD_EXEC_PID") != str(os.getpid()) or os.environ.get("NOTIFY_SOCKET"):
        return None
    return (
        "this service of systemd has no notification socket: a restart would end it, because systemd takes the exit of "
        "the old process for the end of the service. Put Type=notify into the unit's [Service], also where it says "
        "Type=notify-reload, which systemd knows since 253; or set systemd=False if it says ExitType=cgroup"
    )


def check_unit() -> str | None:
    """Return what is wrong with the unit of this first generation, as far as a process can know; else None.

    That is what forbids a restart, or a wrapper: systemd has executed another process, which has started this one. A
    process cannot know which NotifyAccess= there is, other than "none".
    """
    if (reason := forbid_restart()) is not None:
        return reason
    executed = os.environ.get("SYSTEMD_EXEC_PID", "")
    if executed in ("", str(os.getpid())) or not os.environ.get("NOTIFY_SOCKET"):
        return None
    return (
        f"the unit's main process is pid {executed} and not this one, so systemd hears nothing from here unless "
        "the unit says NotifyAccess=all. Start this program without a wrapper, or by `exec` (ExecStart=)"
    )
