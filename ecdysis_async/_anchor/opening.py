"""What an anchor opens before its workers start: the control socket, the health address, files, and the addresses.

New code of an anchor opens all of it anew while its workers serve. What it cannot open is left as the former code had
it, and tried again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress

import anyio

from ecdysis_async._handoff.generation import GenerationLog
from ecdysis_async._management.health import HealthServer
from ecdysis_async._management.management import OwnManagement
from ecdysis_async._management.recent import read_recent
from ecdysis_async._sockets.addresses import Address
from ecdysis_async._sockets.entry import Entry
from ecdysis_async._sockets.registry import Registry, listen
from ecdysis_async._system.history import SUFFIX
from ecdysis_async._system.threads import run_in_thread

from . import status
from .config import HealthPage
from .health_pages import make_pages
from .metrics_files import prepare_directory, remove_directory
from .needs import OPENING_ERRORS, Need, Needs
from .sockets import HeldSockets
from .state import AnchorState, Begin

__all__ = ["Opener"]


class _FormerHealth:
    """The answers at the health address of former code."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.has_ended = anyio.Event()


class Opener:
    """Opens what an anchor needs, for itself and for its workers.

    Args:
        state: what the anchor knows.
        sockets: what it holds.
        management: what speaks for it: it has the control socket and the pid file.
        log: its log.
        begin: runs something beside everything else.
    """

    def __init__(
        self, state: AnchorState, sockets: HeldSockets, management: OwnManagement, log: GenerationLog, begin: Begin
    ) -> None:
        self._state = state
        self._sockets = sockets
        self._management = management
        self._begin = begin
        pid_file = state.config.settings.pid_file
        self._pid_file = Need(f"the pid file {pid_file}", self._open_pid_file) if pid_file is not None else None
        self._needs = Needs(self._list_needs(), state, log, begin)
        # The answers at the health address of former code, which end once this code's own one is open.
        self._former_health: _FormerHealth | None = None

    async def open(self) -> None:
        """Open everything before the first worker starts; new code opens what can be opened.

        Raises:
            OSError, LookupError, ValueError: something cannot be opened, and no worker serves; the text says what to
                do.
        """
        if self._state.is_follower:
            # The workers serve, whatever cannot be opened.
            await self._needs.open_each()
        else:
            await self._needs.open_all()
        # Those of a former anchor may have been elsewhere.
        self._sockets.control.close_unclaimed(unlink=True)
        if self._former_health is None:
            self._sockets.health.close_unclaimed(unlink=True)

    async def publish_before_first(self) -> None:
        """Let the pid file name this process before the first worker answers: whoever has an answer may look for it."""
        if not self._state.has_served:
            # It is tried again, and told, once the service serves.
            with suppress(OSError):
                await self._management.publish()

    async def publish(self) -> None:
        """Let the pid file name this process, now that it serves; where that cannot be, it is tried again."""
        if self._pid_file is not None:
            await self._needs.open(self._pid_file)

    def remove_metrics_dir(self) -> None:
        """Remove the files of the workers' metrics, at the end of the service; harmless if there are none."""
        if self._state.metrics_dir is not None:
            remove_directory(self._state.metrics_dir)

    def _list_needs(self) -> list[Need]:
        """Return what has to be open, in the order in which it is opened."""
        config = self._state.config
        needs = []
        if config.set_up_logging is not None:
            needs.append(
                Need("the logging of --log-config", functools.partial(self._set_up_logging, config.set_up_logging))
            )
        if config.metrics_dir is not None:
            needs.append(
                Need(
                    f"the directory of metrics {config.metrics_dir}",
                    functools.partial(self._prepare_metrics_dir, config.metrics_dir),
                )
            )
        if config.health is not None:
            needs.append(
                Need(f"the health address {config.health}", functools.partial(self._open_health, config.health))
            )
        if self._pid_file is not None:
            needs.append(self._pid_file)
        needs += [
            Need(f"the address {address}", functools.partial(self._open_sockets, open_sockets))
            for address, open_sockets in config.open_sockets.items()
        ]
        if config.control_path is not None:
            # Its lock says whether this service runs already. Whoever asks new code about its upgrade is to hear of
            # everything that is missing.
            place = len(needs) if self._state.is_follower else 0
            needs.insert(place, Need(f"the control socket {config.control_path}", self._open_control))
        return needs

    async def _set_up_logging(self, set_up: Callable[[], None]) -> None:
        await run_in_thread(set_up)

    async def _open_control(self) -> None:
        registry, management = self._sockets.control, self._management
        try:
            await management.open_control()
        except OPENING_ERRORS:
            if self._state.is_follower:
                await management.open_former_control()
                registry.start_listening()
            raise
        await management.close_former_control()
        registry.start_listening()
        self._begin(management.serve_control)
        self._begin(management.keep_control)

    async def _open_health(self, address: Address) -> None:
        registry = self._sockets.health
        try:
            opened = await run_in_thread(functools.partial(listen, registry, address))
        except OPENING_ERRORS:
            if self._state.is_follower and self._former_health is None:
                # Load balancers ask where former code has answered, until this code can answer elsewhere.
                self._former_health = _FormerHealth()
                self._begin(self._serve_former_health, self._former_health)
            raise
        try:
            for entry in opened:
                entry.start_listening()
        except OSError:
            for entry in opened:
                registry.give_back(entry)
            raise
        state = self._state
        control_path = state.config.control_path
        if HealthPage.STATUS in state.config.pages and control_path is not None and not state.ledger.recent:
            # A service that has ended here has left its history.
            state.ledger.recent = await run_in_thread(functools.partial(read_recent, control_path + SUFFIX))
        if self._former_health is not None:
            # A socket that is closed under its reader leaves its number to the next one, which the reader then takes
            # out of the loop.
            self._former_health.scope.cancel()
            await self._former_health.has_ended.wait()
            self._former_health = None
        for entry in set(registry.entries) - set(opened):
            registry.release(entry, unlink=True)
        for entry in opened:
            self._begin(self._serve_health, entry)

    async def _serve_former_health(self, former: _FormerHealth) -> None:
        try:
            with former.scope:
                async with anyio.create_task_group() as task_group:
                    for entry in self._sockets.health.entries:
                        task_group.start_soon(self._serve_health, entry)
        finally:
            former.has_ended.set()

    async def _serve_health(self, entry: Entry) -> None:
        why_not_ready = functools.partial(status.why_not_ready, self._state)
        await HealthServer(entry.sock, why_not_ready, make_pages(self._state, self._sockets)).run()

    async def _prepare_metrics_dir(self, wanted: str) -> None:
        state = self._state
        prepare = functools.partial(prepare_directory, wanted, state.metrics_dir, state.metrics_dir_wanted)
        state.metrics_dir = await run_in_thread(prepare)
        state.metrics_dir_wanted = wanted

    async def _open_pid_file(self) -> None:
        if self._state.has_served:
            await self._management.publish()
        else:
            await self._management.prepare(lambda: self._state.description)

    async def _open_sockets(self, open_sockets: Callable[[Registry], object]) -> None:
        service = self._sockets.service
        await run_in_thread(functools.partial(open_sockets, service))
        for entry in service.entries:
            # What former code has opened may be asked for with others by now.
            entry.apply_permissions()
