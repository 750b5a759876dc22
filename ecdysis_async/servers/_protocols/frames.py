"""Where the frames and messages end that a WebSocket's client sends (RFC 6455, 5): whichever server reads them.

A client that is in the middle of a message is the last one to be told that the service restarts.
"""

from __future__ import annotations

from collections.abc import Callable

from ecdysis_async._accepting.asyncio_connections import ServerConnection, protocol_of

__all__ = ["FollowsFrames", "FrameFollower", "follow_frames"]

# The length of the shortest head of a frame, bytes.
SHORTEST_HEAD = 2

# From here on, opcodes are those of control frames, which may stand between the frames of one message.
FIRST_CONTROL_OPCODE = 8


class FrameFollower:
    """Follows the bytes of a client, to know where frames and messages end."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._left = 0
        self._is_fragmented = False

    @property
    def is_between_frames(self) -> bool:
        """Whether the last byte that was received ended a frame."""
        return not self._head and not self._left

    @property
    def is_between_messages(self) -> bool:
        """Whether the last byte that was received ended a message."""
        return self.is_between_frames and not self._is_fragmented

    def is_in_message(self) -> bool:
        """Say whether a message has begun, and not ended."""
        return not self.is_between_messages

    def feed(self, data: bytes | bytearray) -> None:
        """Take note of bytes that were received."""
        position = 0
        while position < len(data):
            if self._left:
                step = min(self._left, len(data) - position)
                self._left -= step
                position += step
                continue
            step = self._head_size() - len(self._head)
            self._head += data[position : position + step]
            position += step
            if len(self._head) == self._head_size():
                self._left = self._payload_size()
                if self._head[0] & 0x0F < FIRST_CONTROL_OPCODE:
                    self._is_fragmented = not self._head[0] & 0x80
                self._head.clear()

    # RFC 6455, 5.2: two bytes, two or eight more for a longer length, and four for a mask.
    def _head_size(self) -> int:
        if len(self._head) < SHORTEST_HEAD:
            return SHORTEST_HEAD
        length, masked = self._head[1] & 0x7F, self._head[1] & 0x80
        return SHORTEST_HEAD + {126: 2, 127: 8}.get(length, 0) + (4 if masked else 0)

    def _payload_size(self) -> int:
        match self._head[1] & 0x7F:
            case 126:
                return int.from_bytes(self._head[2:4])
            case 127:
                return int.from_bytes(self._head[2:10])
            case length:
                return length


class FollowsFrames:
    """A protocol of WebSockets that follows its client's frames itself.

    Attributes:
        inbound: what it knows of them.
    """

    inbound: FrameFollower


def follow_frames(connection: ServerConnection) -> Callable[[], bool]:
    """Follow the frames of a WebSocket whose handshake is about to be answered.

    Returns:
        Says whether its client is in the middle of a message.
    """
    protocol = protocol_of(connection.transport) if connection.transport is not None else None
    if isinstance(protocol, FollowsFrames):
        return protocol.inbound.is_in_message
    follower = FrameFollower()
    connection.overhear(follower.feed)
    return follower.is_in_message
