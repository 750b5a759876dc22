"""Where a WebSocket is offered for transfer: an offer can be withdrawn, and is read at the last moment."""

from __future__ import annotations

import pytest

from ecdysis_async.servers._common.transfer import Transfer


def test_an_offer_is_a_state_or_a_function_that_returns_it() -> None:
    transfer = Transfer()
    assert not transfer.is_offered
    assert transfer.inherited is None
    for offered in ({"room": 1}, lambda: {"room": 1}):
        transfer.offer(offered)
        assert transfer.is_offered
        assert transfer.state() == {"room": 1}
    transfer.offer(None)
    assert not transfer.is_offered


def test_what_json_cannot_hold_cannot_travel() -> None:
    transfer = Transfer()
    transfer.offer(object())
    with pytest.raises(TypeError):
        transfer.state()
