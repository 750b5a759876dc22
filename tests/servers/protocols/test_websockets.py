"""Which connections of the library websockets can move."""

from __future__ import annotations

from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection

from ecdysis_async._connections.parcel import Refused, Release, Transferable
from ecdysis_async.servers._protocols.websockets import WebSocketTransfer, movable, transfer_of


class Still:
    """A connection that was made without a transfer."""


def test_an_offer_for_a_connection_that_cannot_move_has_no_effect() -> None:
    still: Any = Still()
    transfer_of(still).offer("state")
    assert not transfer_of(still).is_offered


def test_a_movable_class_is_transferable() -> None:
    kind = movable(ServerConnection)
    assert issubclass(kind, ServerConnection)
    assert issubclass(kind, Transferable)


def test_another_kind_of_connection_is_refused() -> None:
    with pytest.raises(Refused, match=r"http/1\.1"):
        WebSocketTransfer(lambda: pytest.fail("nothing is made")).resume(Release(kind="http/1.1"))
