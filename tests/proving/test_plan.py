"""What may be planned, and what is said about the rest."""

from __future__ import annotations

from typing import Any

import pytest

from ecdysis_async._proving.plan import (
    Kind,
    Plan,
    PlanError,
    Shape,
    Step,
    Url,
    mix_requests,
    order_steps,
    read_requests,
)

REQUESTS = (Shape(Kind.NEW),)
RESTART = (Step.RESTART,)
URL = Url("http", "127.0.0.1", 8000)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:8000", Url("http", "127.0.0.1", 8000, "/")),
        ("http://127.0.0.2/deep/path", Url("http", "127.0.0.2", 80, "/deep/path")),
        ("https://localhost/", Url("https", "localhost", 443, "/")),
        ("http://[::1]:9", Url("http", "::1", 9, "/")),
    ],
)
def test_urls(text: str, url: Url) -> None:
    assert Url.parse(text) == url


@pytest.mark.parametrize("host", ["example.org", "10.0.0.1", "0.0.0.0", "localhost.example.org", "[2001:db8::1]"])
def test_the_load_goes_to_loopback_only(host: str) -> None:
    with pytest.raises(PlanError, match="the load goes to loopback only"):
        Url.parse(f"http://{host}:8000/")


@pytest.mark.parametrize("text", ["127.0.0.1:8000", "ftp://127.0.0.1/", "http://", "http://127.0.0.1:port/"])
def test_what_is_no_url(text: str) -> None:
    with pytest.raises(PlanError, match="--url"):
        Url.parse(text)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": "no/slash"}, "begins with /"),
        ({"path": "/a b"}, "no spaces"),
        ({"path": "/\u00fc"}, "only ASCII"),
        ({"method": "GE T"}, "a word such as PUT"),
        ({"headers": (("A b", "c"),)}, "one word"),
        ({"headers": (("A", "b\r\nC: d"),)}, "only ASCII"),
        ({"headers": (("A", "\u00fc"),)}, "only ASCII"),
        ({"rate": 0.0}, "above 0"),
        ({"rate": 1e6}, "at the most"),
        ({"connections": 0}, "from 1"),
        ({"body": -1}, "bytes"),
        ({"seconds": float("inf")}, "a number"),
    ],
)
def test_what_is_no_request(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Shape(Kind.NEW, **changes)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "what shall be proved"),
        ({"target": "a:b", "control": "c"}, "one service"),
        ({"run_options": ("--workers", "2"), "control": "c"}, "need a TARGET"),
        ({"target": "a:b", "restart_command": ("x",), "url": URL}, "has `ecdysis restart`"),
        ({"command": ("x",)}, "needs --restart-command"),
        ({"command": ("x",), "restart_command": ("y",)}, "needs --url"),
        ({"restart_command": ("kill", "{pid}"), "url": URL}, "which is not there"),
        ({"control": "c", "steps": (Step.BROKEN,)}, "broken release: only a service that the proof itself"),
        ({"target": "a:b", "requests": ()}, "at least one"),
        ({"target": "a:b", "requests": (Shape(Kind.NEW, rate=1500),) * 2}, "3000 requests a second"),
        ({"target": "a:b", "patience": 0.0}, "--patience"),
    ],
)
def test_what_contradicts_itself(given: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Plan(**{"requests": REQUESTS, "steps": RESTART, **given})


@pytest.mark.parametrize(
    ("restarts", "faults", "steps"),
    [
        (1, (False, False, False), "restart"),
        (2, (True, False, False), "restart, broken release, restart"),
        (0, (False, True, True), "successor killed, predecessor killed"),
        (3, (True, True, True), "restart, broken release, restart, successor killed, restart, predecessor killed"),
    ],
)
def test_faults_come_between_restarts(restarts: int, faults: tuple[bool, bool, bool], steps: str) -> None:
    broken, successor, predecessor = faults
    found = order_steps(restarts, broken=broken, successor=successor, predecessor=predecessor)
    assert ", ".join(found) == steps


def test_a_plan_of_nothing() -> None:
    with pytest.raises(PlanError, match="at least one restart"):
        order_steps(0, broken=False, successor=False, predecessor=False)


def test_a_mixed_load_has_all_kinds_and_its_rate() -> None:
    shapes = mix_requests(["/a", "/b"], rate=50, connections=10)
    assert {shape.kind for shape in shapes} == set(Kind)
    assert sum(shape.rate for shape in shapes) == pytest.approx(50)
    assert {shape.path for shape in shapes} == {"/a", "/b"}
    assert [shape.kind for shape in shapes if shape.optional] == [Kind.UPLOAD, Kind.WEBSOCKET]
    assert not any(
        shape.optional for shape in mix_requests(["/"], rate=1, connections=1, upload_path="/u", websocket_path="/w")
    )


def test_a_file_of_requests() -> None:
    text = """
    [[request]]
    kind = "kept"
    path = "/a"
    rate = 5
    connections = 3
    headers = { accept = "text/html" }

    [[request]]
    kind = "upload"
    expect = 201
    """
    kept, upload = read_requests(text, "requests.toml")
    assert kept == Shape(Kind.KEPT, "/a", 5, connections=3, headers=(("accept", "text/html"),))
    assert (upload.method, upload.body, upload.expect) == ("POST", 65536, 201)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"requests.toml: there is no \[\[request\]\]"),
        ("[[request]", "requests.toml: "),
        ("[[request]]\nkind = 'quick'", "request 1: kind 'quick': there are new, kept"),
        ("[[request]]\n[[request]]\npth = '/'", "request 2: 'pth' is unknown"),
        ("[[request]]\nrate = 'many'", "rate = 'many' is of the wrong type"),
        ("[[request]]\nrate = true", "wrong type"),
    ],
)
def test_a_file_that_is_wrong(text: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        read_requests(text, "requests.toml")
