"""The preflight: a new release, started to tell what it is and to end, and what a restart into it would change.

It imports and builds what it would serve, and neither listens nor runs its start-up. Of the environment only names are
ever told: values are compared by digests with a salt of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import anyio

from ecdysis_async._ipc.channel import Channel
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._system.claims import CHECK_KEY, PRIVATE_KEYS
from ecdysis_async._system.launch import Launch, describe_launch, find_unfollowed_link
from ecdysis_async._system.process import Process, describe_exit, spawn
from ecdysis_async._system.stderr import StderrTail
from ecdysis_async._system.threads import run_in_thread
from ecdysis_async.errors import ChannelError, RestartError, SpawnFailed
from ecdysis_async.settings import Settings

__all__ = [
    "check_release",
    "compare",
    "describe_place",
    "describe_place_of",
    "describe_release",
    "digest_environment",
    "preflight",
    "tell",
    "with_link",
]

CHECKED: Final = "checked"

# What a release gets to end after it has told, or has not told in time, seconds.
END_GRACE_SECONDS = 3.0

# Of a shell's own, or of the one process they are addressed to: no restart hands them on.
PASSING_KEYS: Final = frozenset(
    {*PRIVATE_KEYS, "PWD", "OLDPWD", "SHLVL", "_", "NOTIFY_SOCKET", "WATCHDOG_USEC", "SYSTEMD_EXEC_PID"}
)

Json = dict[str, Any]

# What a release tells


def describe_place() -> Json:
    """Return what this process runs by, and where, with symlinks and without."""
    try:
        directory = os.getcwd()
    except FileNotFoundError:  # it was deleted
        directory = None
    return {
        "interpreter": sys.executable,
        "real_interpreter": os.path.realpath(sys.executable),
        "python": platform.python_version(),
        "directory": directory,
        # As the shell or the service manager has named it, where that is still the same.
        "logical_directory": _logical_directory(directory, os.environ),
    }


def describe_place_of(pid: int, environment: Mapping[str, str]) -> Json:
    """Return what another process runs by, and where. Where it has just ended, it is what this process runs by.

    Args:
        pid: of the process.
        environment: what it was started with.
    """
    try:
        directory = os.readlink(f"/proc/{pid}/cwd")
        real_interpreter = os.readlink(f"/proc/{pid}/exe")
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            interpreter = os.fsdecode(file.read().partition(b"\0")[0])
    # It has ended, or has another user.
    except OSError:
        return describe_place()
    is_same = real_interpreter == os.path.realpath(sys.executable)
    return {
        # A process may have given itself a title.
        "interpreter": interpreter if os.path.isabs(interpreter) and os.path.exists(interpreter) else real_interpreter,
        "real_interpreter": real_interpreter,
        "python": platform.python_version() if is_same else os.path.basename(real_interpreter),
        "directory": directory if os.path.isdir(directory) else None,
        "logical_directory": _logical_directory(directory, environment),
    }


def describe_release(sockets: Sequence[str] | None, environment: Mapping[str, str], **facts: Any) -> Json:
    """Return what this release is.

    Args:
        sockets: those that it would ask for, as ``tcp:127.0.0.1:8000``; None where only its run would tell.
        environment: what it was given, and has read.
        facts: whatever else there is to tell.
    """
    salt = os.urandom(8).hex()
    return {
        **facts,
        "process": describe_place(),
        "environment": {"salt": salt, "digests": digest_environment(environment, salt)},
        "sockets": list(sockets) if sockets is not None else None,
    }


def digest_environment(environment: Mapping[str, str], salt: str) -> dict[str, str]:
    """Return a digest of each variable's value, by which it is compared and from which it is not known."""
    return {
        name: hashlib.sha256(f"{salt}\0{name}\0{value}".encode(errors="surrogateescape")).hexdigest()[:16]
        for name, value in environment.items()
        if name not in PASSING_KEYS
    }


async def tell(sock: socket.socket | None, release: Json) -> None:
    """Tell the process that has started this one. If it does not listen any more, it has lost interest."""
    if sock is None:
        return
    channel = Channel(sock)
    try:
        with contextlib.suppress(ChannelError):
            await channel.send(CHECKED, release)
    finally:
        channel.close()


# Who asks


async def preflight(launch: Launch, timeout: float) -> Json:
    """Start a release in check mode, and return what it tells; it has ended then.

    Raises:
        RestartError: it tells nothing; the text says why, with what it has written.
    """
    environment = {**launch.environment, CHECK_KEY: "1"}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    channel = Channel(ours)
    stderr: StderrTail | None = None
    process: Process | None = None
    try:
        stderr = StderrTail()
        tail = stderr
        with theirs:
            process = await run_in_thread(
                lambda: spawn(Launch(launch.arguments, launch.directory, environment), theirs, tail.write_end)
            )
        stderr.close_write_end()
        return await _hear(process, channel, stderr, timeout)
    except OSError as error:
        raise SpawnFailed(f"the check could not be started: {error}") from error
    finally:
        channel.close()
        if process is not None:
            with anyio.CancelScope(shield=True):
                await process.end(END_GRACE_SECONDS)
            process.close()
        elif stderr is not None:
            stderr.close_write_end()
        if stderr is not None:
            stderr.close()


async def _hear(process: Process, channel: Channel, stderr: StderrTail, timeout: float) -> Json:
    """Return what a release tells; its stderr is passed on meanwhile."""
    release: Json | None = None
    failure = ""
    async with anyio.create_task_group() as task_group:
        task_group.start_soon(stderr.run)
        try:
            with anyio.fail_after(timeout):
                frame = await channel.receive()
            frame.close()
            if frame.type == CHECKED:
                release = frame.body
            else:
                failure = "it takes the check for a restart: it is of a release of this library without checks"
        except TimeoutError:
            failure = f"it has not told what it is within {timeout:g} seconds"
        except ChannelError:
            # It has ended, or is about to.
            with anyio.move_on_after(END_GRACE_SECONDS):
                await process.wait()
            if process.returncode is None:
                failure = "it runs on, and does not say what it is"
            else:
                failure = f"it has ended with {describe_exit(process.returncode)}"
        task_group.cancel_scope.cancel()
    if release is None:
        await process.end(END_GRACE_SECONDS)
        stderr.read_rest()
        await stderr.pass_rest_on()
        raise CheckFailed(f"the new release fails its check: {failure}", process.returncode, stderr=stderr.read())
    return release


class CheckFailed(RestartError):
    """A release does not pass its check.

    Attributes:
        returncode: how it ended.
    """

    def __init__(self, message: str, returncode: int | None, *, stderr: str) -> None:
        super().__init__(message, stderr=stderr)
        self.returncode = returncode


async def check_release(
    settings: Settings,
    stale_keys: Sequence[str],
    entries: Sequence[Entry],
    environment: Mapping[str, str],
    place: Json | None = None,
    *,
    is_bound_to_directory: bool = False,
) -> Json:
    """Check what this service's own restart would start, and return what it would change.

    Args:
        settings: of the service.
        stale_keys: as in ``describe_launch``.
        entries: the sockets that the service has.
        environment: what it was given, and has read.
        place: as in ``compare``.
        is_bound_to_directory: as in ``describe_launch``.

    Raises:
        RestartError: the release fails, or there is nothing to be started.
    """
    launch, _ = await run_in_thread(
        lambda: describe_launch(
            settings.command,
            settings.environment,
            settings.env_file,
            stale_keys,
            is_bound_to_directory=is_bound_to_directory,
        )
    )
    release = await preflight(launch, settings.ready_timeout)
    return await with_link(compare(release, entries, environment, place))


async def with_link(comparison: Json) -> Json:
    """Return a comparison, and which link a restart of this process would not follow."""
    return {**comparison, "unfollowed_link": await run_in_thread(find_unfollowed_link)}


def compare(release: Json, entries: Sequence[Entry], environment: Mapping[str, str], place: Json | None = None) -> Json:
    """Return a release, and what a restart of this process into it would change.

    Args:
        release: what it has told of itself; it may come from anybody.
        entries: the sockets that this service has.
        environment: what this service was given, and has read.
        place: what the service runs by, and where; None: what this process does.

    Raises:
        KeyError, TypeError, ValueError: it is no such thing.
    """
    digests = {str(name): str(digest) for name, digest in release["environment"]["digests"].items()}
    ours = digest_environment(environment, str(release["environment"]["salt"]))
    had = {f"{entry.kind.value}:{entry.address}": entry for entry in entries}
    wanted = [str(each) for each in release["sockets"]] if release["sockets"] is not None else None
    return {
        **{name: value for name, value in release.items() if name not in ("environment", "sockets")},
        "pid": os.getpid(),
        "former_process": place if place is not None else describe_place(),
        "environment": {
            "added": sorted(digests.keys() - ours.keys()),
            "removed": sorted(ours.keys() - digests.keys()),
            "changed": sorted(name for name in digests.keys() & ours.keys() if digests[name] != ours[name]),
        },
        "sockets": None
        if wanted is None
        else {
            "kept": [each for each in wanted if each in had or each.startswith("fd:")],
            "added": [each for each in wanted if each not in had and not each.startswith("fd:")],
            # What the service manager has passed is known by another name, and stays in any case.
            "removed": [each for each, entry in had.items() if each not in wanted and entry.number is None],
        },
    }


def _logical_directory(directory: str | None, environment: Mapping[str, str]) -> str | None:
    logical = environment.get("PWD", "")
    with contextlib.suppress(OSError):
        if directory is not None and os.path.isabs(logical) and os.path.samefile(logical, directory):
            return logical
    return directory
