"""The errors of the library, each with its cause and what to do about it.

Nothing here does I/O, and this module imports nothing of the package.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "ChannelClosed",
    "ChannelError",
    "DescriptorMismatch",
    "DescriptorsLost",
    "DrainInterrupt",
    "EcdysisError",
    "FrameTooLarge",
    "GarbledFrame",
    "HandoffAborted",
    "NotReady",
    "ReadyTimeout",
    "RestartError",
    "RestartInProgress",
    "RestartUnsupported",
    "RestartWhileDraining",
    "RolledBack",
    "SpawnFailed",
    "StartupError",
    "StashFailed",
    "SuccessorFailed",
    "TakeoverFailed",
    "TruncatedFrame",
    "UnknownMessage",
    "VersionMismatch",
]


# How an error is told with what the successor has written: this line, and each of those with a mark in front.
STDERR_HEAD = "last lines of the successor's stderr:"
STDERR_MARK = "  | "


class EcdysisError(Exception):
    """Base of every error of this library that is an :class:`Exception`."""


class RestartError(EcdysisError):
    """A restart did not happen; the generation that raises this goes on serving.

    Attributes:
        phase: the phase of the handoff that failed (see ``RestartReport.phases``).
        stderr: the last lines the successor wrote to its stderr, or an empty string.
        is_usage: whether an option is wrong, which only the successor could see.
    """

    is_usage: bool = False

    def __init__(self, message: str, *, phase: str | None = None, stderr: str = "") -> None:
        super().__init__(message)
        self.phase = phase
        self.stderr = stderr

    def __str__(self) -> str:
        text = str(self.args[0])
        if self.stderr:
            text = "\n".join((text, STDERR_HEAD, *(STDERR_MARK + line for line in self.stderr.splitlines())))
        return text


class RestartInProgress(RestartError):
    """Another restart of this generation has not ended yet. Await the other restart, or try again later."""


class NotReady(RestartError):
    """This generation has not begun to serve; there is nothing yet that a successor could take over."""


class SpawnFailed(RestartError):
    """The successor's process could not be started at all (no such program, no permission, no memory)."""


class StashFailed(RestartError):
    """What the successor should have inherited could not be made: its producer raised, or took too long."""


class SuccessorFailed(RestartError):
    """The successor died, or reported an exception, before it was ready."""


class ReadyTimeout(RestartError):
    """The successor did not get ready within ``ready_timeout`` seconds and was killed."""


class RolledBack(RestartError):
    """The successor failed after it had begun to serve; this generation accepts again."""


class RestartWhileDraining(RestartError):
    """This generation is leaving: it has a successor already, or the service is being stopped."""


class RestartUnsupported(RestartError):
    """This process cannot be restarted in this way, here; the message says what can be done instead."""


class StartupError(EcdysisError):
    """A service cannot start. The text says why, and what to do; what there was of a traceback is on stderr.

    Attributes:
        is_usage: whether an option is wrong.
    """

    is_usage: bool = False


class TakeoverFailed(StartupError):
    """There is no service whose sockets this process could take over, or it does not hand them over."""


class DrainInterrupt(EcdysisError):
    """Raised by ``until_draining`` at a safe point: close this connection now, politely.

    Attributes:
        moved: the connection lives on in the successor: there is nobody to say goodbye to. Raised by ``transfer``.
    """

    def __init__(self, message: str = "", *, moved: bool = False) -> None:
        super().__init__(message)
        self.moved = moved


class HandoffAborted(SystemExit):
    """This process was to be a successor, and the restart was called off; it must leave.

    A :class:`SystemExit`, so that it ends the process with a line on stderr and status 1, and so that no
    ``except Exception`` keeps a process alive that nobody will ever let accept.
    """


class ChannelError(EcdysisError):
    """What came over a handoff channel breaks the protocol; it is of no further use, except after DescriptorsLost."""


class ChannelClosed(ChannelError):
    """The peer closed the channel, at the end of a frame."""


class TruncatedFrame(ChannelError):
    """The peer closed the channel in the middle of a frame."""


class GarbledFrame(ChannelError):
    """The bytes received are no frame of this protocol."""


class FrameTooLarge(ChannelError):
    """A frame announces more bytes or more descriptors than any real one has."""


class DescriptorMismatch(ChannelError):
    """A frame came with fewer or with more descriptors than it states."""


class DescriptorsLost(ChannelError):
    """The kernel dropped descriptors on the way (MSG_CTRUNC), most likely at the limit RLIMIT_NOFILE.

    Alone among these it leaves the channel usable: all of the frame that it concerns has come, but for those.

    Attributes:
        type: the frame's.
        body: the frame's.
    """

    def __init__(self, message: str, type: str = "", body: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.type = type
        self.body = body or {}


class UnknownMessage(ChannelError):
    """A well-formed frame of a type that nobody expects at this point of the handoff."""


class VersionMismatch(ChannelError):
    """The two generations have no version of the handoff protocol in common."""
