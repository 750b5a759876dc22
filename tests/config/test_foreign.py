"""Options of other servers: applied, or answered with what to do instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ecdysis_async._config.foreign import FOREIGN, advise, explain_gunicorn_config, translate
from ecdysis_async._config.gather import gather
from ecdysis_async._config.options import OPTIONS, OptionError, Options
from ecdysis_async.cli import run as run_module


def read(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Options | str:
    """Read a command line; return the options, or what is said of them."""
    found: list[Options] = []

    def serve(options: Options) -> int:
        found.append(options)
        return 0

    monkeypatch.setattr(run_module, "serve", serve)
    result = CliRunner(env={"WEB_CONCURRENCY": None}).invoke(run_module.run, ["main:app", *arguments])
    assert result.exit_code == (0 if found else 2), result.output
    return found[0] if found else result.output


@pytest.mark.parametrize(
    ("command_line", "expected"),
    [
        ("--timeout-keep-alive 5", {"server_options": {"timeout_keep_alive": "5"}}),
        ("--keep-alive 5 --ws wsproto", {"server_options": {"timeout_keep_alive": "5", "ws": "wsproto"}}),
        ("--lifespan off --limit-concurrency 9", {"server_options": {"lifespan": "off", "limit_concurrency": "9"}}),
        ("--no-server-header", {"server_options": {"server_header": "False"}}),
        # What is said of the server itself goes first.
        ("--ws none --server-option ws=auto", {"server_options": {"ws": "auto"}}),
        ("-w 4 -b :8000 --timeout 120", {"workers": 4, "hang_timeout": 120}),
        ("-k uvicorn.workers.UvicornWorker -t 0", {"server": "uvicorn", "hang_timeout": None}),
        ("-k uvicorn_worker.UvicornH11Worker", {"loop": "asyncio", "server_options": {"http": "h11"}}),
        ("-k trio", {"loop": "trio"}),
        ("-k uvloop --loop asyncio", {"loop": "asyncio"}),
        ("--worker-class aiohttp.GunicornUVLoopWebWorker", {"server": "aiohttp", "loop": "uvloop"}),
        ("--graceful-timeout 9", {"drain_timeout": 9}),
        ("--timeout-graceful-shutdown 9", {"drain_timeout": 9}),
        ("--limit-max-requests 9 --limit-max-requests-jitter 2", {"max_requests": 9, "max_requests_jitter": 2}),
        ("--access-logfile - --error-logfile -", {"access_log": True}),
        ("--proxy-headers --forwarded-allow-ips * --root-path /api", {"forwarded_allow_ips": "*", "root_path": "/api"}),
        ("--reload-dir . --reload-include *.html", {"reload_dirs": (".",), "reload_include": ("*.html",)}),
    ],
)
def test_what_is_applied(command_line: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    options = read(monkeypatch, *command_line.split())
    assert {name: getattr(options, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("command_line", "expected"),
    [
        ("--preload", "--preload: each worker imports the application"),
        ("--threads 4", "--threads: a worker is one loop"),
        ("-k gevent", "--worker-class: 'gevent': it serves WSGI"),
        ("-k my.Worker", "--worker-class: 'my.Worker' is not known here, only uvicorn.workers.UvicornWorker, "),
        ("--access-logfile access.log", "--access-logfile: the log goes to stderr"),
        ("--no-use-colors", "--use-colors: NO_COLOR=1"),
        ("-D", "--daemon: that is for who starts the service: see `ecdysis unit`"),
        ("--user www-data", "--user: start it as that user"),
        ("--quic-bind :443", "--quic-bind: QUIC is not handed over"),
        ("--header X:1", "--header: add it in the application"),
    ],
)
def test_what_is_answered(command_line: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = read(monkeypatch, *command_line.split())
    assert isinstance(answer, str)
    assert f"ecdysis: {expected}" in answer


def test_nothing_of_another_server_hides_an_option_of_ours() -> None:
    ours = {name for each in OPTIONS for name in (f"--{each.key}", *each.aliases)}
    theirs = [flag for each in FOREIGN for flags in each.flags for flag in flags.split("/")]
    assert not ours & set(theirs)
    assert len(theirs) == len(set(theirs))
    names = {each.split("-", 2)[2] for each in ours if each.startswith("--")}
    for each in FOREIGN:
        if each.ours not in (None, "TARGET"):
            assert str(each.ours).removeprefix("--") in names


CONFIG = """
import multiprocessing
raise SystemExit("it was run")
bind = ["0.0.0.0:8000", "unix:/run/app.sock"]
workers = multiprocessing.cpu_count() * 2 + 1
worker_class = "uvicorn.workers.UvicornWorker"
timeout: int = 120
keepalive = 5
preload_app = True
reload = False
accesslog = "-"
errorlog = "/app.log"
max_requests = 1000
mine = "a helper"
def post_fork(server, worker):
    pass
"""


def test_a_file_of_gunicorn_is_explained_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "gunicorn.conf.py"
    path.write_text(CONFIG)
    with pytest.raises(OptionError) as caught:
        gather({"target": "main:app", "config": str(path)}, {})
    head, *lines = str(caught.value).splitlines()
    assert head.startswith(f"{path} is a program for gunicorn, and is not run here")
    assert lines == [
        "  bind = ['0.0.0.0:8000', 'unix:/run/app.sock']: --bind 0.0.0.0:8000 --bind unix:/run/app.sock",
        "  workers = multiprocessing.cpu_count() * 2 + 1: --workers, with what that comes to",
        "  worker_class = 'uvicorn.workers.UvicornWorker': --server uvicorn",
        "  timeout = 120: --hang-timeout 120",
        "  keepalive = 5: --timeout-keep-alive 5",
        "  preload_app = True: each worker imports the application, so that a restart takes its new code: leave it out",
        "  reload = False: leave it out",
        "  accesslog = '-': --access-log",
        "  errorlog = '/app.log': the log goes to stderr, where a service manager keeps it; files by --log-config",
        "  max_requests = 1000: --max-requests 1000",
        "  def post_fork: gunicorn calls it in its own processes: use the application's lifespan",
    ]


def test_a_file_that_cannot_be_explained(tmp_path: Path) -> None:
    path = tmp_path / "gunicorn.conf.py"
    path.write_text("mine = 1\n")
    assert "It sets nothing that is known here." in explain_gunicorn_config(str(path))
    path.write_text("def f(:\n")
    with pytest.raises(OptionError, match="cannot be read"):
        explain_gunicorn_config(str(path))


def test_settings_of_other_servers_in_a_file_of_options(tmp_path: Path) -> None:
    path = tmp_path / "hypercorn.toml"
    path.write_text('worker_class = "trio"\n')
    with pytest.raises(OptionError, match="'worker_class' is an option of another server's; here: --worker-class"):
        gather({"target": "main:app", "config": str(path)}, {})
    assert advise("no_such_setting") is None


def test_what_is_said_here_is_left_as_it_is() -> None:
    assert translate({"target": "a:b", "workers": None}) == {"target": "a:b", "workers": None}
