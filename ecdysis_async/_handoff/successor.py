"""The successor's side of a restart, carried out: from its first word to the predecessor's last."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import mmap
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Final

import anyio

from ecdysis_async._accepting.data_plane import DataPlane
from ecdysis_async._connections.receiver import make_room
from ecdysis_async._ipc.channel import Channel, Frame
from ecdysis_async._ipc.peer import Death, Peer
from ecdysis_async._system.claims import take_last_word
from ecdysis_async._system.descriptors import close_all, open_place
from ecdysis_async._system.history import Note, history
from ecdysis_async._system.import_times import import_times
from ecdysis_async._system.release import describe_release
from ecdysis_async._system.shared_memory import LastWord, make_memory
from ecdysis_async._system.shortages import REMEDIES
from ecdysis_async._system.stderr import identity, pass_on
from ecdysis_async._system.tracebacks import describe_failure
from ecdysis_async.errors import (
    ChannelClosed,
    ChannelError,
    DescriptorsLost,
    GarbledFrame,
    HandoffAborted,
    StartupError,
)
from ecdysis_async.report import RestartReport

from .ancestors import Ancestor
from .generation import Generation, GenerationLog
from .protocol import (
    VERSIONS,
    DrainMessage,
    FromSuccessor,
    SuccessorAction,
    SuccessorEvent,
    SuccessorState,
    Timer,
    step_successor,
    successor_event,
)
from .side import ALL_COUNTERS, ERROR_BYTES, HandoffSide, as_channel_error

__all__ = ["SuccessorSide"]

# Limits of waits that no setting is worth: each is far more than a healthy process needs, seconds.
LISTENERS_SECONDS = 30.0
# A successor that is ready waits for the pause, and for what the predecessor still produces for it.
COMMIT_SECONDS = 120.0


class SuccessorSide(HandoffSide[SuccessorState, SuccessorEvent, SuccessorAction]):
    """The start of a generation that has a predecessor.

    Args:
        sock: the channel.
        generation: this one.
        plane: what opens with the commit, with the sockets that are inherited.
        on_change: called after each change of the state.
        is_child: whether the predecessor has started this process, and given it a pipe for its stderr.

    Attributes:
        opened: set when this generation accepts, or never will.
        predecessor: what is known of the predecessor, once its sockets are here.
        report: the predecessor's report, once the restart has settled.
        restart_id: what the restart is asked for by, also where the predecessor dies before it has reported.
        farewells: what has come of frames about the predecessor's drain already; for the lineage.
        reason: why it was aborted.
        summary: the same in one line.
    """

    timed_out = SuccessorEvent.TIMED_OUT
    failed = SuccessorEvent.FAILED
    limits: Mapping[Timer, float] = {Timer.LISTENERS: LISTENERS_SECONDS, Timer.COMMIT: COMMIT_SECONDS}

    def __init__(
        self,
        sock: socket.socket,
        generation: Generation,
        plane: DataPlane,
        on_change: Callable[[SuccessorSide], None],
        *,
        is_child: bool = True,
    ) -> None:
        super().__init__(SuccessorState.GREETING, step_successor, generation)
        self.opened = anyio.Event()
        self.predecessor: Ancestor | None = None
        self.report: RestartReport | None = None
        self.restart_id = ""
        self.reason = self.summary = ""
        self.is_usage = False
        # What the predecessor has said of its drain before this side knew that it had settled.
        self.farewells: list[Frame | DescriptorsLost] = []
        self._plane = plane
        self._on_change = on_change
        self._channel = Channel(sock)
        # The sockets that were here before this process could ask for them, until there is an answer.
        self._provision: Frame | None = None
        # In the predecessor's order.
        self._inherited: list[socket.socket] = []
        # The service's real stderr, and the pipe that stands in its place until this generation is ready.
        self._stderr = -1
        self._stderr_pipe = identity(2) if is_child else None
        self._stderr_read_end = -1
        # What the predecessor has told others that it has counted, until it says so itself.
        descriptor = take_last_word()
        self._last_word = LastWord(descriptor) if descriptor is not None else None
        # What has taken the place of the pipe, unless the application has pointed stderr elsewhere.
        self._restored: tuple[int, int] | None = None

    async def greet(self) -> None:
        """Say hello, and take over what the predecessor holds.

        Raises:
            HandoffAborted: it has called the restart off, is gone, or does not answer.
        """
        try:
            said_hello = time.monotonic()
            frame = await self._hear_answer()
            self.state, _ = self._step(self.state, successor_event(frame.type))
            if self.state is not SuccessorState.INITIALISING:
                frame.close()
                raise HandoffAborted("ecdysis: the predecessor called the restart off")
            self._take_over(frame)
            self._note_process(said_hello, time.monotonic())
        except (ChannelError, TimeoutError, OSError, KeyError, OverflowError, TypeError, ValueError) as error:
            remedy = REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None
            raise HandoffAborted(
                f"ecdysis: the predecessor did not hand over its sockets: {error!r}{f': {remedy}' if remedy else ''}"
            ) from error
        finally:
            self._close_provision()
            if self.predecessor is None:
                self.state = SuccessorState.ABORTED
                self.close()

    async def _hear_answer(self) -> Frame:
        """Say hello, and return the predecessor's answer; where none can come any more, the provision, if there is one.

        The application may begin with a provision at once. Whether the predecessor is dead, or lives and this side has
        to leave, is learnt in the next moment (``Peer.run``).

        Raises:
            ChannelError: the predecessor is gone, or says what cannot be read.
            TimeoutError: it does not answer.
        """
        answer: Frame | None = None
        # The predecessor may have a stash to make first, for which it takes its own ready_timeout at the most.
        seconds = max(LISTENERS_SECONDS, self.generation.settings.ready_timeout)
        try:
            with anyio.move_on_after(seconds):
                # Where the predecessor is dead, what it has said is here all the same.
                with contextlib.suppress(ChannelClosed):
                    await self._say_hello()
                while answer is None:
                    answer = self._find_answer(await self._channel.receive())
            # A process that was stopped for longer wakes to both: what is here already was in time.
            while answer is None and (frame := self._channel.receive_nowait()) is not None:
                answer = self._find_answer(frame)
        except ChannelClosed:
            if self._provision is None:
                raise
            answer = self._take_provision()
        if answer is None:
            raise TimeoutError(f"it did not answer within {seconds:g} seconds")
        return answer

    def _find_answer(self, frame: Frame) -> Frame | None:
        """Return the answer that a frame is; None where it is the provision, behind which the answer comes."""
        if frame.body.get("provision"):
            self._provision = frame
            return None
        if frame.body.get("as_before") and self._provision is not None:
            return self._take_provision()
        return frame

    def _take_provision(self) -> Frame | None:
        provision, self._provision = self._provision, None
        return provision

    def _close_provision(self) -> None:
        if (provision := self._take_provision()) is not None:
            provision.close()

    async def run(self) -> None:
        """Carry the handoff out until it has settled; then listen to the drain of the predecessor, until it is dead."""
        assert self.predecessor is not None
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self._listen)
            await self.advance()
            self._tasks.cancel_scope.cancel()

    def close(self) -> None:
        """Let go of the descriptors; harmless if done already."""
        self._channel.close()
        while self.farewells:
            if isinstance(item := self.farewells.pop(), Frame):
                item.close()
        if self.predecessor is not None:
            self.predecessor.peer.close()
        self._forget_last_word()
        for descriptor in (self._stderr, self._stderr_read_end):
            if descriptor >= 0:
                os.close(descriptor)
        self._stderr = self._stderr_read_end = -1

    # What happens

    async def _listen(self) -> None:
        assert self.predecessor is not None
        await self.predecessor.peer.run(self._deliver)

    def _deliver(self, item: Frame | ChannelError | Death) -> None:
        assert self.predecessor is not None
        match item:
            case Death():
                self.post(SuccessorEvent.DIED)
            case Frame() | DescriptorsLost() if item.type in set(DrainMessage):
                self.farewells.append(item)
            case ChannelError():
                self.post(SuccessorEvent.BROKEN, item)
            case Frame():
                self._note_message(Note.GOT, item.type)
                try:
                    event = successor_event(item.type)
                    if event is SuccessorEvent.SETTLED:
                        self._read_settled(item.body)
                    elif event is SuccessorEvent.COMMIT:
                        self.generation.inherited_stash.receive(item.body["stash"], item.descriptors)
                    if "counts" in item.body:
                        self._forget_last_word()
                        self.generation.inherit_counts(self.predecessor.pid, item.body["counts"])
                except (ChannelError, OSError, KeyError, OverflowError, TypeError, ValueError) as error:
                    self.post(SuccessorEvent.BROKEN, as_channel_error(error, item))
                else:
                    self.post(event, item)
                finally:
                    item.close()

    def _hear_last_word(self) -> None:
        """Go on with what a predecessor has counted that was killed before it could say so."""
        if self._last_word is None or self.predecessor is None:
            return
        try:
            if record := self._last_word.read():
                self.generation.inherit_counts(self.predecessor.pid, json.loads(record))
        except (OSError, ValueError) as error:
            self.log.warning("what the predecessor has counted cannot be read: %r", error)
        self._forget_last_word()

    def _forget_last_word(self) -> None:
        if self._last_word is not None:
            self._last_word.close()
            self._last_word = None

    def _read_settled(self, body: Mapping[str, Any]) -> None:
        # First what matters: another release's idea of a report must not keep the restart from settling.
        pending = {int(each["pid"]): base64.b64decode(each["pending"]) for each in body["ancestors"]}
        for ancestor in self.generation.lineage.ancestors:
            ancestor.peer.channel.resume(pending.get(ancestor.pid, b""))
        try:
            self.report = RestartReport.from_json(body["report"])
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            self.log.warning("the predecessor's report cannot be read: %r", error)

    async def before_event(self, event: SuccessorEvent, cause: object) -> bool:
        # A process that was stopped for longer wakes to both, its timer and a predecessor that died meanwhile; leaving
        # for the first would leave nobody. The death is on its way here.
        assert self.predecessor is not None
        return event is not SuccessorEvent.TIMED_OUT or not self.predecessor.peer.is_dead()

    def changed(self, before: SuccessorState, event: SuccessorEvent, cause: object) -> None:
        if event is SuccessorEvent.OPENED or self.state.final:
            self.opened.set()
        if self.state is before:
            return
        log = self.log
        assert self.predecessor is not None
        history.note(
            Note.STATE,
            restart=self.restart_id,
            side="successor",
            state=self.state.value,
            event=event.value,
            peer=self.predecessor.pid,
        )
        if event is SuccessorEvent.DIED:
            self.generation.inherited_stash.expect_no_more()
            self._restore_stderr()
            self._hear_last_word()
            log.warning("the predecessor (pid %d) died; this generation goes on without it", self.predecessor.pid)
        if self.state is SuccessorState.ABORTED:
            if isinstance(cause, BaseException):
                # The predecessor has read the traceback on stderr, if there is one worth it.
                is_told = isinstance(cause, StartupError)
                self.is_usage = isinstance(cause, StartupError) and cause.is_usage
                self.reason = str(cause) if is_told else describe_failure(cause)[-ERROR_BYTES:]
                self.summary = str(cause) if is_told else traceback.format_exception_only(cause)[-1].strip()
            else:
                self.reason = self.summary = _REASONS.get(event, event.value)
            # The predecessor tells why its restart has failed, unless it cannot be told.
            level = logging.WARNING if event in _UNTOLD else logging.DEBUG
            log.log(level, "this generation does not come to serve, and leaves: %s", self.summary)
        else:
            log.debug("handoff: %s", self.state.value)
        self._on_change(self)

    async def perform(self, action: SuccessorAction) -> None:
        match action:
            case SuccessorAction.SEND_READY:
                import_times.end()
                imports = [each.to_json() for each in import_times.take()]
                history.note(Note.IMPORTS, restart=self.restart_id, imports=imports)
                registry = self._plane.registry
                # Find them by their sockets: the application may have closed one by now, which changes the places in
                # the registry.
                kept = {entry.sock for entry in registry.entries if entry.claimed}
                claimed = [index for index, sock in enumerate(self._inherited) if sock in kept]
                # A copy that nobody accepts on would reset what queues on it; the predecessor still answers there.
                registry.close_unclaimed()
                created = [entry.name for entry in registry.entries if not entry.inherited]
                self._restore_stderr()
                # The predecessor tells its caller whom this will hurry.
                max_draining = self.generation.settings.max_draining
                body = {
                    "claimed": claimed,
                    "created": created,
                    "max_draining": max_draining,
                    "release": describe_release(),
                }
                await self._send(FromSuccessor.READY, body)
            case SuccessorAction.SEND_FAILED:
                await self._send(
                    FromSuccessor.FAILED, {"error": self.reason, **({"is_usage": True} if self.is_usage else {})}
                )
            case SuccessorAction.OPEN:
                self._restore_stderr()
                registry = self._plane.registry
                # There are some left only where the predecessor died before this side was ready: nobody else has them.
                for entry in registry.close_unclaimed(unlink=True):
                    self.log.warning("nobody claims %s: it is closed, nobody listens there", entry.name)
                async with self.generation.gate_lock:
                    # What was created here, also where the task that will accept has not had its turn yet.
                    registry.start_listening()
                    await self._plane.gate.open()
                self._opened_at = time.monotonic()
                self.post(SuccessorEvent.OPENED)
            case SuccessorAction.SEND_SERVING:
                await self._send(FromSuccessor.SERVING, {"opened_at": self._opened_at})
            case SuccessorAction.SEND_SETTLE:
                await self._send(FromSuccessor.SETTLE)
            case SuccessorAction.SEND_STOPPING:
                await self._send(FromSuccessor.STOPPING)
            case SuccessorAction.RETURN:
                async with self.generation.gate_lock:
                    await self._plane.gate.end()
                await self._send(FromSuccessor.RETURNED)

    # How it is done

    async def _send(self, message: FromSuccessor, body: Mapping[str, Any] | None = None) -> None:
        self._note_message(Note.SENT, message.value)
        try:
            await self._channel.send(message, body)
        except ChannelError as error:
            # Whether that is a death or a fault, the listener finds out and posts.
            self.log.debug("%s was not sent: %s", message, error)

    def _note_message(self, kind: Note, message: str) -> None:
        peer = self.predecessor.pid if self.predecessor is not None else None
        history.note(kind, restart=self.restart_id, message=message, peer=peer)

    def _note_process(self, said_hello: float, got_listeners: float) -> None:
        """Take note of how this process has come here: which restart that was for is known only now."""
        if self.restart_id:
            history.write_from_now_on()
        history.note(
            Note.PROCESS,
            restart=self.restart_id,
            generation=self.generation.number,
            peer=self.predecessor.pid if self.predecessor is not None else None,
            first=import_times.began,
            hello=said_hello,
            listeners=got_listeners,
            imports=[each.to_json() for each in import_times.take()],
        )

    async def _say_hello(self) -> None:
        pidfd = os.pidfd_open(os.getpid())
        counters = make_memory("ecdysis-counters")
        try:
            os.ftruncate(counters, ALL_COUNTERS.size)
            self._plane.tracker.share(memoryview(mmap.mmap(counters, ALL_COUNTERS.size)).cast("Q"))
            body = {"versions": list(VERSIONS), "pid": os.getpid(), "provision": True}
            await self._channel.send(FromSuccessor.HELLO, body, [pidfd, counters])
        finally:
            os.close(pidfd)
            os.close(counters)

    def _take_over(self, frame: Frame) -> None:
        generation, body = self.generation, frame.body
        descriptors = iter(frame.descriptors)
        with contextlib.ExitStack() as unowned:
            unowned.callback(close_all, descriptors)
            sockets, stashes, ancestors = body["sockets"], body["stash"], body["ancestors"]
            if len(frame.descriptors) != 3 + len(sockets) + len(stashes) + 2 * len(ancestors):
                count = len(frame.descriptors)
                raise GarbledFrame(f"{count} descriptors do not match the {len(sockets)} sockets named")
            peer = Peer(self._channel, next(descriptors))
            unowned.callback(peer.close)
            self._stderr, self._stderr_read_end = next(descriptors), next(descriptors)
            self._plane.registry.inherit(sockets, [next(descriptors) for _ in sockets])
            self._inherited = [entry.sock for entry in self._plane.registry.entries[: len(sockets)]]
            memories = [next(descriptors) for _ in stashes]
            try:
                generation.inherited_stash.receive(stashes, memories)
            finally:
                close_all(memories)
            generation.inherited_stash.expect(body["stash_later"])
            for ancestor in ancestors:
                number, pid = int(ancestor["generation"]), int(ancestor["pid"])
                channel = Channel(socket.socket(fileno=next(descriptors)))
                generation.lineage.ancestors.append(Ancestor(number, pid, Peer(channel, next(descriptors))))
            generation.number = int(body["generation"])
            generation.env_file_keys = tuple(body["env_file_keys"])
            self.restart_id = str(body["restart"])
            generation.log = GenerationLog(generation.number, self.restart_id)
            generation.log.speak()
            self.log = generation.log
            make_room(int(body.get("connections", 0)))
            # An earlier release has none.
            generation.lock_file_place = tuple(body.get("lock_file") or ())
            if self._last_word is None and (word := open_place(body.get("last_word") or (), os.O_RDONLY)) is not None:
                self._last_word = LastWord(word)
            self.predecessor = Ancestor(int(body["predecessor"]["generation"]), int(body["predecessor"]["pid"]), peer)
            unowned.pop_all()

    def take_stderr(self, descriptor: int) -> None:
        """Let the service's stderr be another one than the predecessor's: the log of a takeover is the newcomer's.

        Args:
            descriptor: where it leads; it is taken over.
        """
        if self._stderr >= 0:
            os.close(self._stderr)
            self._stderr = descriptor
            return
        if self._restored is not None and identity(2) == self._restored:
            with contextlib.suppress(OSError, ValueError, AttributeError):  # as below
                sys.stderr.flush()
            os.dup2(descriptor, 2)
            self._restored = identity(2)
        os.close(descriptor)

    def _restore_stderr(self) -> None:
        """Put the service's real stderr in the place of the predecessor's pipe, which ends with the predecessor."""
        if self._stderr < 0:
            return
        # Unless the application has pointed it elsewhere by now.
        if self._stderr_pipe is not None and identity(2) == self._stderr_pipe:
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None: nothing is buffered
                sys.stderr.flush()
            os.dup2(self._stderr, 2)
            self._restored = identity(2)
        os.close(self._stderr)
        self._stderr = -1
        # What was started until now may write to the pipe for as long as it lives, and so does this one pass it on.
        assert self._plane.task_group is not None
        self._plane.task_group.start_soon(self._pass_stderr_on)

    async def _pass_stderr_on(self) -> None:
        read_end, self._stderr_read_end = self._stderr_read_end, -1
        try:
            await pass_on(read_end)
        finally:
            os.close(read_end)


# What nobody else knows of.
_UNTOLD: Final = (SuccessorEvent.STOP_HERE, SuccessorEvent.TIMED_OUT, SuccessorEvent.BROKEN)

_REASONS: Final = {
    SuccessorEvent.ABORT: "the predecessor called it off",
    SuccessorEvent.STOP: "the service is being stopped",
    SuccessorEvent.STOP_HERE: "this process was told to stop before it served",
    SuccessorEvent.TIMED_OUT: "the predecessor does not answer",
    SuccessorEvent.BROKEN: "the predecessor's channel is broken",
}
