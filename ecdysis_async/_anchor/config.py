"""What an anchor is to run, as data. `cli/anchor.py` makes it of the options of `ecdysis run`."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ecdysis_async._management.control_access import ControlAccess
from ecdysis_async._sockets.addresses import Address
from ecdysis_async._sockets.registry import Registry
from ecdysis_async.settings import Settings

from .reload import Watched

__all__ = ["AnchorConfig", "HealthPage"]

# How often a worker tells of itself, seconds.
BEAT_SECONDS = 1.0
# How many beats a worker has at least in the time after which it counts as hanging.
BEATS_PER_HANG = 4


class HealthPage(enum.Enum):
    """What can be had at the health address besides /live and /ready."""

    METRICS = "metrics"
    STATUS = "status"


@dataclass(frozen=True, slots=True)
class AnchorConfig:
    """What an anchor is to run. Times are in seconds.

    Attributes:
        open_sockets: what asks the registry for the sockets of an address, by the address. It may block. Where it
            fails, none of them stays.
        workers: how many workers there shall be.
        settings: the settings of the workers' handoffs. Pid file and command are the anchor's.
        control_path: the absolute path of the control socket; None for none.
        control_access: who may use it.
        systemd: whether systemd is told of the service, as in ``Ecdysis``.
        hang_timeout: for how long a worker's loop may not turn, before the worker is replaced.
        max_requests: after how many requests a worker is replaced.
        max_requests_jitter: up to how many requests are added to that, at random for each worker.
        max_rss: how many bytes of a worker may be resident, before it is replaced.
        health: the address where /live and /ready answer.
        pages: which further pages answer there.
        metrics_dir: where prometheus_client of all workers keeps the application's metrics: a path, or `AUTO`.
        traces: whether restarts are told as traces of OpenTelemetry.
        lame_duck: how long a service goes on that SIGTERM has told to stop, while /ready says that it is not ready.
        reload: the files and directories whose changes restart the service, if any do.
        takeover: the control socket of the anchor to take the place of.
        one_at_a_time: whether the workers of a release have ended before those of the next one start.
        set_up_logging: sets logging up, where that has failed at the start of new code; None where it is set up.
        is_checked_first: whether the command line has a check mode, in which it is run before a takeover.
    """

    open_sockets: Mapping[str, Callable[[Registry], object]]
    workers: int = 1
    settings: Settings = field(default_factory=Settings)
    control_path: str | None = None
    control_access: ControlAccess = field(default_factory=ControlAccess)
    systemd: bool | None = None
    hang_timeout: float | None = None
    max_requests: int | None = None
    max_requests_jitter: int = 0
    max_rss: int | None = None
    health: Address | None = None
    pages: frozenset[HealthPage] = frozenset()
    metrics_dir: str | None = None
    traces: bool = False
    lame_duck: float = 0.0
    reload: Watched | None = None
    takeover: str | None = None
    one_at_a_time: bool = False
    set_up_logging: Callable[[], None] | None = None
    is_checked_first: bool = False

    @property
    def beat_seconds(self) -> float:
        """How often a worker tells of itself, seconds."""
        return BEAT_SECONDS if self.hang_timeout is None else min(BEAT_SECONDS, self.hang_timeout / BEATS_PER_HANG)
