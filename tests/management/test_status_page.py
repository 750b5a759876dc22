"""The live page: it may do nothing but what stands in it. What it shows is seen in tests/scenarios/run."""

from __future__ import annotations

import json
import re

import pytest

from ecdysis_async._management import status_page


@pytest.mark.backends("asyncio")
async def test_it_allows_nothing_but_itself() -> None:
    page = await status_page.show()
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r"""(src|href)="(?!data:)|@import|url\(|\son\w+=|style=""", page.text)
    # The one address in it is a name, of the elements of SVG.
    assert set(re.findall(r"https?://[^\"' ]*", page.text)) == {"http://www.w3.org/2000/svg"}


def test_it_is_told_of_no_request() -> None:
    process = {"slot": 0, "pid": 7, "generation": 1, "state": "draining", "connections": 1, "serving": ["GET /hunter2"]}
    status = {**dict.fromkeys(status_page.SHOWN), "draining": [process], "workers": [process]}
    page = status_page.describe(status, [])
    assert "hunter2" not in page.text
    assert json.loads(page.text)["workers"][0]["connections"] == 1


def test_it_may_know_nothing_that_could_be_secret() -> None:
    assert not {"process", "last_report", "anchor"} & set(status_page.SHOWN)
