"""What an anchor is to run: data, and how the options of `ecdysis run` say it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ecdysis_async._config.options import DEFAULT_BIND, Options
from ecdysis_async._management.control_path import locate
from ecdysis_async._sockets.addresses import Address, listen
from ecdysis_async._sockets.registry import Registry
from ecdysis_async.settings import Settings

__all__ = ["AnchorConfig", "make_config"]

# How often a worker tells of itself, seconds; more often where a hang is to be found sooner.
BEAT_SECONDS = 1.0
# A worker is looked after at least so often in the time that it may be silent.
BEATS_PER_HANG = 4

# With --reload, the longest probation, seconds.
RELOAD_PROBATION_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class AnchorConfig:
    """What an anchor is to run. Times are in seconds.

    Attributes:
        open_sockets: asks the registry for the service's sockets; it may block.
        workers: how many.
        settings: of the workers' handoffs; pid file and command are the anchor's.
        control_path: absolute.
        systemd: as in ``Ecdysis``.
        hang_timeout: a worker whose loop does not turn for so long is replaced.
        max_requests: after so many requests a worker is replaced, ...
        max_requests_jitter: ... and a random number up to this more.
        max_rss: a worker with more bytes resident is replaced.
        health: where /live and /ready answer.
        reload_paths: files and directories to watch, whose changes restart the service.
        takeover: the control socket of the anchor to take the place of.
        is_checked_first: whether its command line has a check mode, in which it is run before a takeover.
        lame_duck: how long a service that was told to stop by SIGTERM goes on, while /ready says that it is not.
    """

    open_sockets: Callable[[Registry], None]
    workers: int = 1
    settings: Settings = field(default_factory=Settings)
    control_path: str | None = None
    systemd: bool | None = None
    hang_timeout: float | None = None
    max_requests: int | None = None
    max_requests_jitter: int = 0
    max_rss: int | None = None
    health: Address | None = None
    lame_duck: float = 0.0
    reload_paths: tuple[str, ...] = ()
    takeover: str | None = None
    is_checked_first: bool = False

    @property
    def beat_seconds(self) -> float:
        """How often a worker tells of itself, seconds."""
        return BEAT_SECONDS if self.hang_timeout is None else min(BEAT_SECONDS, self.hang_timeout / BEATS_PER_HANG)


def make_config(options: Options, control_path: str | None) -> AnchorConfig:
    """Plan the service of `ecdysis run`."""

    def open_sockets(registry: Registry) -> None:
        # What nobody has asked for is opened by the first worker, if its target wants that: an `async def main` may
        # listen elsewhere.
        for address in options.bind if options.bind != DEFAULT_BIND else ():
            listen(registry, address, backlog=options.backlog, mode=options.unix_mode)

    return AnchorConfig(
        open_sockets,
        workers=options.workers,
        settings=Settings(
            ready_timeout=options.ready_timeout,
            drain_timeout=options.drain_timeout,
            # Who saves a file again does not want to wait.
            probation=min(options.probation, RELOAD_PROBATION_SECONDS) if options.reload else options.probation,
            pid_file=Path(options.pid_file) if options.pid_file is not None else None,
            env_file=Path(options.env_file).absolute() if options.env_file is not None else None,
        ),
        control_path=control_path,
        hang_timeout=options.hang_timeout,
        max_requests=options.max_requests,
        max_requests_jitter=options.max_requests_jitter,
        max_rss=options.max_rss,
        health=options.health_bind,
        lame_duck=options.lame_duck,
        reload_paths=_find_reload_paths(options),
        takeover=locate(options.takeover) if options.takeover is not None else None,
        is_checked_first=True,
    )


def _find_reload_paths(options: Options) -> tuple[str, ...]:
    if not options.reload:
        return ()
    files = [os.path.abspath(path) for path in (options.env_file, options.config) if path is not None]
    return (*map(os.path.abspath, options.reload_dirs or (options.app_dir,)), *files)
