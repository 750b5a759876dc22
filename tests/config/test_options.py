"""What `ecdysis run` may be told, wherever it is read from."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from ecdysis_async._config.gather import gather
from ecdysis_async._config.options import (
    OPTIONS,
    SHORTHANDS,
    Option,
    OptionError,
    Options,
    command_line_options,
)
from ecdysis_async._sockets.addresses import Internet, Unix


def test_defaults() -> None:
    options = Options("main:app")
    assert options.bind == (Internet("127.0.0.1", 8000),)
    assert (options.workers, options.server, options.loop) == (1, "auto", "auto")
    assert (options.ready_timeout, options.drain_timeout, options.probation) == (60, 30, 5)
    assert options.hang_timeout is options.max_requests is options.max_rss is None
    assert options.access_log and options.proxy_headers and not options.reload
    assert options == gather({"target": "main:app"}, {})


def test_names_that_other_servers_have() -> None:
    options = gather({"target": "a:b"}, {"WEB_CONCURRENCY": "5", "FORWARDED_ALLOW_IPS": "*"})
    assert (options.workers, options.forwarded_allow_ips) == (5, "*")
    assert gather({"target": "a:b"}, {"WEB_CONCURRENCY": "5", "ECDYSIS_WORKERS": "2"}).workers == 2
    flags = [flag for each in command_line_options() for flag in (f"--{each.key}", *each.aliases)]
    assert len(flags) == len(set(flags))
    assert {"--host", "--port", "--uds", "--fd", "--graceful-timeout", "--ssl-certfile", "--reload-dir"} <= set(flags)


def test_options_made_by_a_program_are_checked_as_well() -> None:
    with pytest.raises(OptionError, match="workers: a number of workers is needed"):
        Options("a:b", workers=0)
    assert Options("a:b", bind=("unix:/a",)).bind == (Unix("/a"),)  # type: ignore[arg-type]


# What TOML holds, and what a user types.
NUMBERS = (5, -1, 1.5, float("nan"), float("inf"), True)
TEXTS = ("", "'", "\0", "\n", "nan", "9" * 400)
STRANGE: tuple[Any, ...] = (*NUMBERS, *TEXTS, None, [], [5], ["'"], [[]], {}, {"a": 5})


@pytest.mark.parametrize("option", [*OPTIONS, *SHORTHANDS], ids=lambda option: option.name)
def test_whatever_a_file_says_is_read_or_refused_in_words(option: Option) -> None:
    for value in STRANGE:
        with contextlib.suppress(ValueError):
            option.parse(value)


def test_each_service_has_a_control_socket_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    assert Options("a:b").control_path == f"{tmp_path}/a-b-127.0.0.1-8000.sock"
    assert gather({"target": "a:b", "port": "1"}, {}).control_path == f"{tmp_path}/a-b-127.0.0.1-1.sock"
    assert Options("a:b", control="off").control_path is None
    assert Options("a:b", control="name").control_path == f"{tmp_path}/name"
    long = Options("a:b", bind=(Unix("/" + "x" * 100),)).control_path
    assert long is not None
    assert len(long) < 107 + len(str(tmp_path))


@pytest.mark.parametrize("name", ["metrics", "status_page"])
def test_a_page_needs_an_address(name: str) -> None:
    with pytest.raises(OptionError, match=f"^{name} needs health_bind: .* such as 127.0.0.1:9000"):
        Options(target="main:app", **{name: True})  # type: ignore[arg-type]
    options = Options(target="main:app", health_bind=Internet("127.0.0.1", 9000), **{name: True})  # type: ignore[arg-type]
    assert getattr(options, name)
