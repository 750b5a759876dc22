"""What cannot be opened: the end of a first start, and nothing but missing where workers serve."""

from __future__ import annotations

import functools

import anyio
import pytest

from ecdysis_async._anchor import needs
from ecdysis_async._anchor.needs import Need, Needs, explain_failure
from ecdysis_async._anchor.status import describe
from tests.anchor.puppets import Stage, stage

pytestmark = pytest.mark.backends("asyncio")


class Bench:
    """Two needs, of which the first cannot be opened before a test says so."""

    def __init__(self, here: Stage) -> None:
        self.opened: list[str] = []
        self.why: Exception | None = OSError(28, "the disk is full")
        first, second = (Need(name, functools.partial(self._open, name)) for name in ("the pid file", "the address"))
        self.first = first
        self.needs = Needs([first, second], here.state, here.log, here.begun)

    async def _open(self, name: str) -> None:
        if name == "the pid file" and self.why is not None:
            raise self.why
        self.opened.append(name)


async def test_a_first_start_ends_with_the_first_thing() -> None:
    with stage() as here:
        bench = Bench(here)
        with pytest.raises(OSError, match="the disk is full"):
            await bench.needs.open_all()
        assert (bench.opened, here.state.missing) == ([], {})


async def test_what_is_missing_keeps_nothing_else_and_heals(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(needs, "RETRY_SECONDS", 0.01)
    caplog.set_level("INFO")
    with stage() as here:
        bench = Bench(here)
        await bench.needs.open_each()
        assert bench.opened == ["the address"]
        assert here.state.missing == {"the pid file": "the disk is full"}
        assert "the service goes on without the pid file, which is tried again every 0.01 s" in caplog.text
        assert describe(here.state).endswith("; without the pid file")
        # It is tried again already.
        await bench.needs.open(bench.first)
        assert here.begun.names == ["heal"]
        bench.why = ValueError("another reason")
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(here.begun.run)
            change = here.state.changes.next()
            while here.state.missing["the pid file"] != "another reason":  # noqa: ASYNC110 - nothing tells
                await anyio.sleep(0.01)
            bench.why = None
            await change.wait()
        assert here.state.missing == {}
        assert bench.opened == ["the address", "the pid file"]
        assert caplog.text.count("goes on without") == 1
        assert "the pid file could be opened, and is there again" in caplog.text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(2, "make it first"), "make it first"),
        (FileNotFoundError(2, "No such file or directory", "/x"), "[Errno 2] No such file or directory: '/x'"),
        (ValueError("too long"), "too long"),
    ],
)
def test_why(error: Exception, text: str) -> None:
    assert explain_failure(error) == text
