"""Where the application of a WebSocket says that it may move to a successor, and with which state.

Each WebSocket has such a place, whatever serves it; an offer has no effect where the WebSocket cannot move.
"""

from __future__ import annotations

import json
from typing import Any, Final

__all__ = ["TRANSFER", "Transfer"]

TRANSFER: Final = "ecdysis.transfer"
"""Where an application finds the :class:`Transfer` of a WebSocket: in the scope's state, or as an attribute."""


class Transfer:
    """Lets the application of a WebSocket say that it may move to a successor, and with which state.

    Attributes:
        inherited: the state that the predecessor's application offered; None where the WebSocket is new.
    """

    def __init__(self, inherited: Any = None) -> None:
        self.inherited = inherited
        self._offered: Any = None

    def offer(self, state: Any) -> None:
        """Let this WebSocket move while the application waits for a message; the old side of it is disconnected then.

        Args:
            state: what JSON can hold, or a function that returns it and is called at the last moment; None withdraws
                the offer. It must say all that the application needs: the successor runs it anew, from its connecting
                on. An application that sends without being asked has to withdraw its offer before it does.
        """
        self._offered = state

    @property
    def is_offered(self) -> bool:
        """Whether it may move."""
        return self._offered is not None

    def state(self) -> Any:
        """Return the state that is offered at this moment.

        Raises:
            TypeError, ValueError: JSON cannot hold it.
        """
        state = self._offered() if callable(self._offered) else self._offered
        json.dumps(state, allow_nan=False)
        return state
