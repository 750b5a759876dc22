"""Where options come from, and which place goes first; what cannot work is refused with where it was read."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ecdysis_async._config import options as options_module
from ecdysis_async._config.gather import find_control_path, gather
from ecdysis_async._config.options import OPTIONS, OptionError, Options
from ecdysis_async._sockets.addresses import Descriptor, Internet, Unix


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(text: str, name: str = "ecdysis.toml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(write: Callable[..., str]) -> None:
    config = write('workers = 2\nprobation = 2\nready-timeout = 2\nhang_timeout = 2\nlog-level = "debug"\n')
    options = gather(
        {"target": "main:app", "config": config, "workers": "4", "hang_timeout": "off"},
        {"ECDYSIS_WORKERS": "3", "ECDYSIS_PROBATION": "3", "ECDYSIS_HANG_TIMEOUT": "3", "ECDYSIS_READY_TIMEOUT": ""},
    )
    assert (options.workers, options.probation, options.ready_timeout, options.log_level) == (4, 3, 2, "debug")
    assert options.hang_timeout is None


def test_every_option_can_be_a_variable_and_stand_in_the_file(write: Callable[..., str], tmp_path: Path) -> None:
    file = write("A=1", "file")
    texts = {
        "target": "a.b:c.d",
        "factory": "on",
        "app_dir": str(tmp_path),
        "bind": "127.0.0.1:1 unix:/a,fd://3",
        "unix_mode": "660",
        "unix_group": "0",
        "backlog": "5",
        "workers": "3",
        "server": "HYPERCORN",
        "loop": "trio",
        "control": "off",
        "control_mode": "660",
        "control_group": "0",
        "pid_file": "a.pid",
        "ready_timeout": "1.5",
        "drain_timeout": "0",
        "exit_timeout": "8",
        "websocket_close": "together",
        "reload_include": "*.html",
        "reload_exclude": "a/,b_*.py",
        "max_draining": "5",
        "one_at_a_time": "yes",
        "transfer": "off",
        "probation": "0",
        "hang_timeout": "7",
        "max_requests": "10",
        "max_requests_jitter": "3",
        "max_rss": "1.5G",
        "lame_duck": "9",
        "health_bind": "127.0.0.1:2",
        "metrics": "yes",
        "traces": "yes",
        "metrics_dir": "auto",
        "status_page": "yes",
        "takeover": "/run/x.sock",
        "reload": "yes",
        "reload_dirs": str(tmp_path),
        "env_file": file,
        "command": "ecdysis run main:app",
        "log_level": "warning",
        "log_config": file,
        "access_log": "off",
        "proxy_headers": "false",
        "forwarded_allow_ips": "10.0.0.0/8,::1",
        "root_path": "/api",
        "certfile": file,
        "keyfile": file,
        "keyfile_password": "secret",
        "ca_certs": file,
        "cert_reqs": "2",
        "ciphers": "ECDHE",
        "server_options": "ws=none 'h11-max=a b'",
    }
    # Whose file cannot name itself.
    assert {*texts, "config"} == {each.name for each in OPTIONS}
    by_environment = gather({}, {f"ECDYSIS_{name.upper()}": text for name, text in texts.items()})
    lines = [f"{name.replace('_', '-')} = {text!r}" for name, text in texts.items() if name != "server_options"]
    table = "[server-options]\nws = 'none'\nh11-max = 'a b'\n"
    config = write("\n".join([*lines, table]))
    by_file = gather({"config": config}, {})
    assert by_file.config == config
    assert by_environment == dataclasses.replace(by_file, config=None) == gather(texts, {})
    changed = [field.name for field in dataclasses.fields(Options) if getattr(by_file, field.name) == field.default]
    assert changed == []
    assert by_file.bind == (Internet("127.0.0.1", 1), Unix("/a"), Descriptor(3))
    assert (by_file.unix_mode, by_file.max_rss, by_file.cert_reqs) == (0o660, 3 * 2**29, "required")
    assert by_file.server_options == {"ws": "none", "h11_max": "a b"}
    assert "secret" not in repr(by_file)


def test_types_of_toml(write: Callable[..., str]) -> None:
    config = write(
        'target = "main:app"\nbind = ["127.0.0.1:1", "127.0.0.1:2"]\nfactory = true\nhang-timeout = false\n'
        "unix-mode = 0o660\nmax-requests = 0\ndrain-timeout = 1.5\n[server-options]\ntimeout_keep_alive = 20\n"
    )
    options = gather({"config": config}, {})
    assert (options.target, len(options.bind), options.factory, options.hang_timeout) == ("main:app", 2, True, None)
    assert (options.unix_mode, options.max_requests, options.drain_timeout) == (0o660, None, 1.5)
    assert options.server_options == {"timeout_keep_alive": 20}


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ({"port": "1"}, {}, "127.0.0.1:1"),
        ({"host": "0.0.0.0"}, {}, "0.0.0.0:8000"),
        ({"port": "1"}, {"ECDYSIS_HOST": "::1"}, "[::1]:1"),
        ({"port": "1"}, {"ECDYSIS_BIND": "127.0.0.1:2"}, "127.0.0.1:1"),
        ({"bind": ["127.0.0.1:2"]}, {"ECDYSIS_PORT": "1"}, "127.0.0.1:2"),
        ({"bind": ["127.0.0.1:2"], "uds": "a", "fd": "3", "port": "1"}, {}, "127.0.0.1:2 127.0.0.1:1 unix:a fd://3"),
        ({"bind": ["127.0.0.1:2", "127.0.0.1:2"]}, {}, "127.0.0.1:2"),
    ],
)
def test_where_to_listen(given: dict[str, Any], environment: dict[str, str], expected: str) -> None:
    assert " ".join(map(str, gather({"target": "a:b", **given}, environment).bind)) == expected


def test_an_env_file_is_part_of_the_environment(write: Callable[..., str]) -> None:
    env_file = write("ECDYSIS_WORKERS=7\n", "env")
    assert gather({"target": "a:b", "env_file": env_file}, {"ECDYSIS_WORKERS": "2"}).workers == 7


def test_server_options_come_together_from_everywhere(write: Callable[..., str]) -> None:
    config = write("[server-options]\na = 1\nb = 1\nc = 1\n")
    options = gather(
        {"target": "a:b", "config": config, "server_options": ["c=3"]}, {"ECDYSIS_SERVER_OPTIONS": "b=2 c=2"}
    )
    assert options.server_options == {"a": 1, "b": "2", "c": "3"}


@pytest.mark.parametrize(
    ("given", "environment", "text"),
    [
        ({}, {}, "TARGET is missing"),
        ({"target": "main"}, {}, "did you mean main:app?"),
        ({"target": "app/main.py"}, {}, "did you mean app.main:app?"),
        ({"target": "main.py:api"}, {}, "did you mean main:api?"),
        ({"target": "a:b()"}, {}, "did you mean a:b --factory?"),
        ({"workers": "0"}, {}, "--workers: a number of workers is needed, 1 or more, not '0'"),
        ({"workers": "many"}, {}, "--workers: a number of workers"),
        ({}, {"WEB_CONCURRENCY": "x"}, "the variable WEB_CONCURRENCY: a number of workers"),
        ({"server": "uvcorn"}, {}, "--server: it is one of auto, uvicorn"),
        ({"server": "uvcorn"}, {}, "did you mean 'uvicorn'?"),
        ({"drain_timeout": "-1"}, {}, "--drain-timeout: a number of seconds is needed"),
        ({"drain_timeout": "nan"}, {}, "--drain-timeout: a number of seconds is needed"),
        ({"ready_timeout": "0"}, {}, "--ready-timeout: a number of seconds above 0"),
        ({"bind": ["8000"]}, {}, "--bind: '8000' is no address"),
        ({"port": "70000"}, {}, "--port: 70000 is no port"),
        ({"max_rss": "much"}, {}, "--max-rss: a size is needed, such as 512M"),
        ({"unix_mode": "rw"}, {}, "--unix-mode: permissions are octal digits"),
        ({"certfile": "/nowhere"}, {}, "--certfile: there is no file '/nowhere'"),
        ({"app_dir": "/nowhere"}, {}, "--app-dir: there is no directory '/nowhere'"),
        ({"server_options": ["a"]}, {}, "--server-options: write NAME=VALUE"),
        ({"keyfile": __file__}, {}, "keyfile needs a certfile"),
        ({"cert_reqs": "required"}, {}, "needs ca_certs"),
        ({"max_requests_jitter": "3"}, {}, "needs max_requests"),
        ({}, {"ECDYSIS_RELOAD": "perhaps"}, "the variable ECDYSIS_RELOAD: on or off is needed"),
        ({"config": "/nowhere.toml"}, {}, "--config: there is no file"),
        ({"env_file": "/nowhere"}, {}, "--env-file: there is no file"),
    ],
)
def test_what_cannot_work_is_refused(given: dict[str, Any], environment: dict[str, str], text: str) -> None:
    with pytest.raises(OptionError) as caught:
        gather(given if text.startswith("TARGET") else {"target": "a:b", **given}, environment)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("drain-timout = 3", "there is no option 'drain-timout': did you mean 'drain-timeout'?"),
        ("xyzzy = 3", "there is no option 'xyzzy'"),
        ("workers = true", "workers: a number of workers"),
        ("drain-timeout = 'x'", "drain-timeout: a number of seconds"),
        ("bind = 8000", "bind: a list is needed"),
        ("bind = []", "bind: at least one address"),
        ("bind = [8000]", "bind: text is needed"),
        ("log-level = 3", "log-level: it is one of"),
        ("workers", "cannot be read"),
        (f"workers = {'9' * 5000}", "cannot be read"),
        (f"bind = {'[' * 100_000}", "cannot be read"),
        (f"drain-timeout = {10**400}", "drain-timeout: a number of seconds"),
    ],
)
def test_a_bad_file_is_refused(content: str, text: str, write: Callable[..., str]) -> None:
    with pytest.raises(OptionError) as caught:
        gather({"target": "a:b", "config": write(content)}, {})
    assert text in str(caught.value)
    assert "ecdysis.toml" in str(caught.value)


def test_a_control_socket_that_nobody_asked_for_may_be_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    long = str(tmp_path / ("x" * 100))
    monkeypatch.setattr(options_module, "default_directories", lambda: [f"{tmp_path}/file/run", long])
    with caplog.at_level(logging.WARNING):
        assert find_control_path(Options("a:b")) is None
    assert "there is no control socket, say where by --control PATH" in caplog.text
    assert "is too long for a socket" in caplog.text
    # A path that was asked for is answered for by who opens it.
    assert find_control_path(Options("a:b", control=f"{tmp_path}/file/x")) == f"{tmp_path}/file/x"
    assert find_control_path(Options("a:b", control="off")) is None


def test_a_control_socket_takes_the_next_place_that_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    long = str(tmp_path / ("x" * 100))
    monkeypatch.setattr(options_module, "default_directories", lambda: [long, f"{tmp_path}/missing", f"{tmp_path}/run"])
    monkeypatch.setattr(options_module, "MAX_CONTROL_PATH", len(f"{tmp_path}/missing/") + 40)
    assert str(find_control_path(Options("a:b"))).startswith(f"{tmp_path}/run/")


@pytest.mark.parametrize("content", ['keyfile-password = ["hunter2"]', 'server-options = ["hunter2"]'])
def test_a_secret_that_cannot_be_read_is_not_quoted(content: str, write: Callable[..., str]) -> None:
    with pytest.raises(OptionError) as caught:
        gather({"target": "a:b", "config": write(content)}, {})
    assert "hunter2" not in str(caught.value)
