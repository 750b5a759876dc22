"""The metrics of every kind of service."""

from __future__ import annotations

import socket

import ecdysis_async
from ecdysis_async._management.ledger import Closed, Ledger
from ecdysis_async._management.metrics import describe_service
from ecdysis_async._sockets.entry import Entry, Kind


def test_what_is_counted_now_is_added_to_what_was() -> None:
    ledger = Ledger()
    ledger.note_end(0, 5, {Closed.ENDED: 3})
    families = describe_service(ledger, generation=7, closed={Closed.ENDED: 2}, entries=())
    numbers = {(family.name, *labels.values()): value for family in families for _, labels, value in family.samples}
    assert numbers["ecdysis_generation",] == 7
    assert numbers["ecdysis_connections_closed_total", "ended"] == 5
    (build,) = [family for family in families if family.name == "ecdysis_build_info"]
    assert build.samples[0][1]["version"] == ecdysis_async.__version__


def test_a_listener_with_several_sockets_is_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        entries = [Entry("web", Kind.TCP, f"127.0.0.{number}:0", sock) for number, sock in enumerate((one, other))]
        with socket.create_connection(one.getsockname()), socket.create_connection(other.getsockname()):
            families = describe_service(Ledger(), generation=1, closed={}, entries=entries)
    (backlog,) = [family for family in families if family.name == "ecdysis_socket_backlog"]
    assert backlog.samples == [("", {"listener": "web"}, 2)]
