"""What travels of a connection, and the messages it travels in: written, read, and refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ecdysis_async._connections.parcel import Answer, Batch, MalformedMessage, Release, TransferRecord, write_batch


def test_what_a_later_release_adds_is_left_out() -> None:
    fields = TransferRecord("name", 1.5, Release([1], b"\0\xff", "kind")).to_json()
    assert TransferRecord.from_json([*json.loads(json.dumps(fields)), "more"]) == TransferRecord(
        "name", 1.5, Release([1], b"\0\xff", "kind")
    )


RECORD = TransferRecord("name", 1.5, Release([1], b"\0\xff", "kind"))


@pytest.mark.parametrize(
    "fields",
    [
        None,
        {"listener": "name"},
        [],
        ["name", 1.5, "kind", None],
        [1, 1.5, "kind", None, ""],
        ["name", "yesterday", "kind", None, ""],
        ["name", 1e999, "kind", None, ""],
        ["name", 10**400, "kind", None, ""],
        ["name", 1.5, None, None, ""],
        ["name", 1.5, "kind", None, ["AA=="]],
        ["name", 1.5, "kind", None, "A"],
    ],
)
def test_what_is_no_record_is_told(fields: Any) -> None:
    with pytest.raises(MalformedMessage):
        TransferRecord.from_json(fields)


def test_a_batch_is_read_as_it_was_written() -> None:
    message = write_batch(7, [json.dumps(RECORD.to_json())])
    batch = Batch.read(message)
    assert batch.number == 7
    assert [TransferRecord.from_json(each) for each in batch.connections] == [RECORD]


def test_an_answer_is_read_as_it_was_written() -> None:
    assert Answer.read(Answer(7, [0, 2], [3], {"no", "never"}).write()) == Answer(7, {0, 2}, {3}, ["never", "no"])


MALFORMED = [
    b"",
    b'{"batch":1,',
    b"\xff\xfe\xfd",
    b"[1,2]",
    b"null",
    b'{"batch":1}',
    b'{"batch":"1","connections":[],"taken":[],"later":[],"reasons":[]}',
    b'{"batch":1,"connections":7,"taken":7,"later":[],"reasons":[]}',
    b'{"connections":[],"taken":[],"later":[],"reasons":[]}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("message", MALFORMED, ids=lambda message: repr(message[:20]))
@pytest.mark.parametrize("kind", [Batch, Answer])
def test_what_is_no_message_is_told(kind: type[Batch | Answer], message: bytes) -> None:
    with pytest.raises(MalformedMessage):
        kind.read(message)


def test_the_indices_of_an_answer_are_numbers() -> None:
    with pytest.raises(MalformedMessage):
        Answer.read(b'{"batch":1,"taken":[[0]],"later":[],"reasons":[]}')
