"""The peers: how each is started and, as its documentation says, restarted.

Each keeps idle connections for longer than a run takes, gives requests 30 s to finish, and has threads or processes
enough for the slow ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial

from benchmarks.load import HOST
from benchmarks.peers.building import (
    BUILT,
    PROGRAMS,
    beside_python,
    build_in_go,
    build_in_rust,
    require,
    version_of,
    version_of_package,
)
from benchmarks.peers.running import BROKEN, Peer, Running, send

__all__ = ["PEERS"]

# Some documentation leaves it to who restarts to know when the new master serves. It is guessed, generously.
GUESS_SECONDS = 2.5

# Longer than a run takes.
KEEP_SECONDS = 300

DRAIN_SECONDS = 30

# A restart of ours is final after so long. It is 5 s by default, which a run of this kind would spend waiting.
PROBATION_SECONDS = 2

APPLICATION = "benchmarks.asgi:app"


def run_ecdysis(running: Running, *options: str) -> Sequence[str]:
    """Serve by `ecdysis run`."""
    command = [beside_python("ecdysis"), "run", APPLICATION, "--bind", running.address, "--no-access-log"]
    return [*command, "--control", str(running.directory / "control"), f"--probation={PROBATION_SECONDS}", *options]


def run_ecdysis_uvicorn(running: Running, *options: str) -> Sequence[str]:
    """Serve by `ecdysis run`, with uvicorn, which is what it takes by itself."""
    return run_ecdysis(running, "--server-option", f"timeout_keep_alive={KEEP_SECONDS}", *options)


async def restart_ecdysis(running: Running) -> bool:
    """Restart, and wait until that is final."""
    return await running.run(beside_python("ecdysis"), "restart", "--control", str(running.directory / "control"))


def uvicorn(running: Running, *options: str) -> Sequence[str]:
    """Serve by uvicorn."""
    command = [sys.executable, "-m", "uvicorn", APPLICATION, "--host", HOST, "--port", str(running.port)]
    return [*command, "--no-access-log", f"--timeout-keep-alive={KEEP_SECONDS}", *options]


async def stop_and_start(running: Running) -> None:
    """Stop, and start again."""
    running.process.terminate()
    await asyncio.to_thread(running.process.wait)
    running.start()


def gunicorn(running: Running) -> Sequence[str]:
    """Serve by gunicorn, with uvicorn's worker."""
    # Its USR2 does not work where it was started by `python -m`.
    command = [beside_python("gunicorn"), APPLICATION, f"--bind={running.address}", "--pid=pid"]
    worker = ["--worker-class=uvicorn.workers.UvicornWorker", f"--keep-alive={KEEP_SECONDS}"]
    return [*command, *worker, f"--graceful-timeout={DRAIN_SECONDS}"]


async def replace_master(running: Running, farewell: signal.Signals) -> bool | None:
    """Start a new master by USR2, guess when it serves, and end the old one, unless the new one has gone."""
    masters = running.directory / "pid"
    old = int(masters.read_text())
    os.kill(old, signal.SIGUSR2)
    await asyncio.sleep(GUESS_SECONDS)
    try:
        new = int(masters.read_text())
        os.kill(new, 0)
    except (OSError, ValueError):
        return False
    if new == old:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(old, farewell)
    return None


def hypercorn(running: Running) -> Sequence[str]:
    """Serve by hypercorn."""
    command = [sys.executable, "-m", "hypercorn", APPLICATION, "--bind", running.address]
    return [*command, f"--keep-alive={KEEP_SECONDS}", f"--graceful-timeout={DRAIN_SECONDS}"]


def granian(running: Running) -> Sequence[str]:
    """Serve by granian."""
    command = [beside_python("granian"), APPLICATION, "--interface=asgi", "--host", HOST, "--port", str(running.port)]
    # It is in milliseconds, and a minute is the most.
    return [*command, "--http1-header-read-timeout=60000", f"--workers-kill-timeout={DRAIN_SECONDS}"]


def configure_circus(running: Running, _: str) -> None:
    """Let circus hold the socket, and uvicorn inherit it."""
    serve = f"{sys.executable} -m uvicorn {APPLICATION} --fd $(circus.sockets.web) --no-access-log"
    (running.directory / "circus.ini").write_text(
        f"""
[circus]
endpoint = {circus_endpoint(running)}
pubsub_endpoint = ipc://{running.directory}/events

[socket:web]
host = {HOST}
port = {running.port}

[watcher:web]
cmd = {serve} --timeout-keep-alive={KEEP_SECONDS}
use_sockets = True
copy_env = True
graceful_timeout = {DRAIN_SECONDS}
"""
    )


def circus_endpoint(running: Running) -> str:
    """Return where circus is commanded."""
    return f"ipc://{running.directory}/commands"


async def reload_circus(running: Running) -> bool:
    """Reload by the command, which says whether it was understood."""
    return await running.run(beside_python("circusctl"), "--endpoint", circus_endpoint(running), "reload")


def uwsgi(running: Running) -> Sequence[str]:
    """Serve by uWSGI: the Art of Graceful Reloading, chain reloading."""
    command = [require("uwsgi"), "--master", "--lazy-apps", "--need-app", "--plugin=python3", "--disable-logging"]
    serve = [f"--http-socket={running.address}", f"--wsgi-file={PROGRAMS / 'wsgi.py'}", "--processes=2", "--threads=24"]
    return [*command, *serve, "--master-fifo=fifo", f"--worker-reload-mercy={DRAIN_SECONDS}"]


async def chain_reload_uwsgi(running: Running) -> None:
    """Write to its FIFO."""
    fifo = os.open(running.directory / "fifo", os.O_WRONLY | os.O_NONBLOCK)
    os.write(fifo, b"c")
    os.close(fifo)


def configure_nginx(running: Running, release: str) -> None:
    """Answer by itself, which is what differs between releases; slow requests go to a server behind."""
    temporary = "\n".join(
        f"    {kind}_temp_path {running.directory}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (running.directory / "nginx.conf").write_text(
        f"""
daemon off;
worker_processes 2;
pid {running.directory}/pid;
error_log {running.directory}/log;
worker_shutdown_timeout {DRAIN_SECONDS}s;
events {{}}
http {{
    access_log off;
    keepalive_timeout {KEEP_SECONDS}s;
    keepalive_requests 1000000;
{temporary}
    server {{
        listen {running.address};
        default_type text/plain;
        location ~ ^/echo/(.*)$ {{ return 200 "{release} $1"; }}
        location /slow/ {{
            proxy_set_header X-Release {release};
            proxy_pass http://{HOST}:{running.upstream_port};
        }}
    }}
}}
{"what is wrong;" if release == BROKEN else ""}
"""
    )


def nginx(running: Running, *options: str) -> list[str]:
    """Run nginx, as a server or to command one."""
    directory = str(running.directory)
    return [require("nginx"), "-p", directory, "-e", f"{directory}/log", "-c", f"{directory}/nginx.conf", *options]


async def reload_nginx(running: Running) -> bool:
    """Reload by its own command, which looks at the configuration first."""
    return await running.run(*nginx(running, "-s", "reload"))


def configure_haproxy(running: Running, release: str) -> None:
    """Answer by itself, which is what differs between releases; slow requests go to a server behind."""
    (running.directory / "haproxy.cfg").write_text(
        f"""
global
    hard-stop-after {DRAIN_SECONDS}s
defaults
    mode http
    timeout connect 5s
    timeout client {KEEP_SECONDS}s
    timeout server {KEEP_SECONDS}s
    timeout http-keep-alive {KEEP_SECONDS}s
frontend web
    bind {running.address}
    acl is_echo path_beg /echo/
    http-request return status 200 content-type text/plain lf-string "{release} %[path,field(3,/)]" if is_echo
    http-request set-header X-Release {release}
    default_backend behind
backend behind
    server one {HOST}:{running.upstream_port}
{"what is wrong" if release == BROKEN else ""}
"""
    )


async def reload_haproxy(running: Running) -> bool:
    """Check the configuration and send the signal, as the unit that comes with it does."""
    if not await running.run(require("haproxy"), "-q", "-c", "-f", "haproxy.cfg"):
        return False
    running.process.send_signal(signal.SIGUSR2)
    return True


def configure_puma(running: Running, _: str) -> None:
    """Replace workers one by one, which needs an application that no master has loaded."""
    (running.directory / "puma.rb").write_text(
        f"""
bind "tcp://{running.address}"
workers 2
threads 24, 24
preload_app! false
persistent_timeout {KEEP_SECONDS}
worker_shutdown_timeout {DRAIN_SECONDS}
"""
    )


def configure_unicorn(running: Running, _: str) -> None:
    """Have a process for each slow request, and some for the others."""
    (running.directory / "unicorn.rb").write_text(
        f"""
listen "{running.address}"
worker_processes 16
preload_app false
pid "{running.directory}/pid"
"""
    )


def starman(_: Running, address: str) -> Sequence[str]:
    """Serve by Starman below Server::Starter, as the manual of the former shows."""
    command = [require("start_server"), "--interval=2", f"--port={address}", "--signal-on-hup=QUIT", "--"]
    serve = [require("starman"), "--workers=16", "--disable-keepalive", str(PROGRAMS / "application.psgi")]
    return [*command, *serve]


def version_of_starman() -> str:
    """Return the version, where Server::Starter is here, too."""
    require("start_server")
    return version_of("starman", "--version")


HANGUP = "HUP"

PEERS = [
    Peer(
        "ecdysis run (uvicorn on uvloop)",
        "Python",
        "ecdysis restart",
        partial(version_of_package, "ecdysis_async"),
        run_ecdysis_uvicorn,
        restart_ecdysis,
        is_quick=True,
        is_ours=True,
    ),
    Peer(
        "ecdysis run --no-transfer (uvicorn on uvloop)",
        "Python",
        "ecdysis restart",
        partial(version_of_package, "ecdysis_async"),
        lambda running: run_ecdysis_uvicorn(running, "--no-transfer"),
        restart_ecdysis,
        is_ours=True,
    ),
    Peer(
        "ecdysis run --workers 2 (uvicorn on uvloop)",
        "Python",
        "ecdysis restart",
        partial(version_of_package, "ecdysis_async"),
        lambda running: run_ecdysis_uvicorn(running, "--workers=2"),
        restart_ecdysis,
        is_ours=True,
    ),
    Peer(
        "ecdysis run (uvicorn on asyncio)",
        "Python",
        "ecdysis restart",
        partial(version_of_package, "ecdysis_async"),
        lambda running: run_ecdysis_uvicorn(running, "--loop=asyncio"),
        restart_ecdysis,
        is_ours=True,
    ),
    Peer(
        "ecdysis run (hypercorn on trio)",
        "Python",
        "ecdysis restart",
        partial(version_of_package, "ecdysis_async"),
        lambda running: run_ecdysis(
            running, "--server=hypercorn", "--loop=trio", "--server-option", f"keep_alive_timeout={KEEP_SECONDS}"
        ),
        restart_ecdysis,
        is_ours=True,
    ),
    Peer(
        "ecdysis (the crate; hyper on tokio)",
        "Rust",
        HANGUP,
        partial(build_in_rust, "ecdysis"),
        lambda _: [str(BUILT / "ecdysis")],
        send(signal.SIGHUP),
    ),
    Peer(
        "tableflip (net/http)",
        "Go",
        HANGUP,
        partial(build_in_go, "tableflip"),
        lambda _: [str(BUILT / "tableflip")],
        send(signal.SIGHUP),
        is_quick=True,
    ),
    Peer(
        "nginx",
        "C",
        "nginx -s reload",
        partial(version_of, "nginx", "-v"),
        nginx,
        reload_nginx,
        configure_nginx,
        has_upstream=True,
        is_quick=True,
    ),
    Peer(
        "HAProxy",
        "C",
        "haproxy -c, USR2",
        partial(version_of, "haproxy", "-v"),
        lambda _: [require("haproxy"), "-W", "-f", "haproxy.cfg"],
        reload_haproxy,
        configure_haproxy,
        has_upstream=True,
    ),
    Peer(
        "puma, 2 workers",
        "Ruby",
        "USR1 (phased restart)",
        partial(version_of, "puma", "--version"),
        lambda _: [require("puma"), "-C", "puma.rb", str(PROGRAMS / "application.ru")],
        send(signal.SIGUSR1),
        configure_puma,
    ),
    Peer(
        "unicorn, 16 workers",
        "Ruby",
        "USR2, 2.5 s, QUIT",
        partial(version_of, "unicorn", "--version"),
        lambda _: [require("unicorn"), "-c", "unicorn.rb", str(PROGRAMS / "application.ru")],
        partial(replace_master, farewell=signal.SIGQUIT),
        configure_unicorn,
        keeps_connections=False,
    ),
    Peer(
        "Node cluster, 2 workers",
        "JavaScript",
        "fork, listening, disconnect",
        partial(version_of, "node", "--version"),
        lambda _: [require("node"), str(PROGRAMS / "cluster.js")],
        send(signal.SIGHUP),
    ),
    Peer(
        "Starman below Server::Starter, 16 workers",
        "Perl",
        HANGUP,
        version_of_starman,
        lambda running: starman(running, running.address),
        send(signal.SIGHUP),
        keeps_connections=False,
    ),
    Peer(
        "uWSGI, 2 workers",
        "C, Python",
        "chain reload",
        partial(version_of, "uwsgi", "--version"),
        uwsgi,
        chain_reload_uwsgi,
        keeps_connections=False,
    ),
    Peer(
        "gunicorn (uvicorn's worker)",
        "Python",
        "USR2, 2.5 s, TERM",
        partial(version_of_package, "gunicorn"),
        gunicorn,
        partial(replace_master, farewell=signal.SIGTERM),
    ),
    Peer(
        "gunicorn (uvicorn's worker)",
        "Python",
        HANGUP,
        partial(version_of_package, "gunicorn"),
        gunicorn,
        send(signal.SIGHUP),
    ),
    Peer(
        "uvicorn --workers 2",
        "Python",
        HANGUP,
        partial(version_of_package, "uvicorn"),
        lambda running: uvicorn(running, "--workers=2"),
        send(signal.SIGHUP),
        is_quick=True,
    ),
    Peer(
        "uvicorn",
        "Python",
        "stop and start",
        partial(version_of_package, "uvicorn"),
        uvicorn,
        stop_and_start,
    ),
    Peer("hypercorn", "Python", HANGUP, partial(version_of_package, "hypercorn"), hypercorn, send(signal.SIGHUP)),
    Peer("granian", "Python, Rust", HANGUP, partial(version_of_package, "granian"), granian, send(signal.SIGHUP)),
    Peer(
        "circus (uvicorn)",
        "Python",
        "circusctl reload",
        partial(version_of_package, "circus"),
        lambda _: [beside_python("circusd"), "circus.ini"],
        reload_circus,
        configure_circus,
    ),
]
