"""Which pages are at the health address, and what is kept out of them."""

from __future__ import annotations

import json

import pytest

from ecdysis_async._anchor.config import HealthPage
from ecdysis_async._anchor.health_pages import make_pages
from tests.anchor.puppets import make_report, stage


@pytest.mark.parametrize(
    ("wanted", "paths"),
    [
        ((), set()),
        ((HealthPage.METRICS,), {"/metrics"}),
        ((HealthPage.STATUS,), {"/", "/status.json"}),
        (tuple(HealthPage), {"/metrics", "/", "/status.json"}),
    ],
)
def test_what_was_not_asked_for_is_not_there(wanted: tuple[HealthPage, ...], paths: set[str]) -> None:
    with stage(1, pages=frozenset(wanted)) as here:
        assert make_pages(here.state, here.sockets).keys() == paths


async def test_the_status_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "x")
    with stage(1, pages=frozenset({HealthPage.STATUS})) as here:
        here.state.last_report = make_report(error="what it wrote: hunter2", cut_requests=["GET /?token=hunter2"])
        page = await make_pages(here.state, here.sockets)["/status.json"]()
        status = json.loads(page.text)
        assert (page.content_type, status["state"], status["restarts"]) == ("application/json", "serving", [])
        assert "hunter2" not in page.text
        assert "SECRET_KEY" not in page.text


async def test_metrics_are_text() -> None:
    with stage(1, pages=frozenset({HealthPage.METRICS})) as here:
        page = await make_pages(here.state, here.sockets)["/metrics"]()
        assert page.content_type.startswith("text/plain; version=0.0.4")
        assert 'ecdysis_workers{state="serving"} 1\n' in page.text
