"""``ecdysis unit``: the unit files of systemd for a service of ``ecdysis run``, complete and hardened.

What is printed is meant to be read, changed and kept; nothing of it is needed at run time.
"""

from __future__ import annotations

import ipaddress
import os
import pwd
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ecdysis_async._config.gather import gather
from ecdysis_async._config.options import OptionError, Options
from ecdysis_async._config.parsing import OFF
from ecdysis_async._sockets.addresses import Descriptor, Internet, Unix

from .client import Exit
from .run import run

__all__ = ["unit"]

# What a start and a stop may take besides the limits of the options, seconds.
START_LEEWAY = 30
STOP_LEEWAY = 10

# Within how many seconds systemd wants to hear of a loop that turns.
WATCHDOG_SECONDS = 30

# Listeners of the service and of all its workers, with room to spare: each takes a descriptor of systemd.
STORED = 64

FIRST_FREE_PORT = 1024

HOMES = ("/home", "/root", "/run/user")
TEMPORARY = ("/tmp", "/var/tmp")  # noqa: S108 - where code may lie, not where files are made

# Other programs' business, which no server of web applications has.
HARDENING = """\
NoNewPrivileges=yes
PrivateDevices=yes
ProtectSystem=strict
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
LockPersonality=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM
UMask=0027
"""


def _unit(name: str | None, user: str | None, *, socket: bool, output: str | None, **given: Any) -> None:
    """Print a unit of systemd for `ecdysis run TARGET` with these options.

    It waits for readiness, reloads without losing a connection and fails the reload where the new release does,
    keeps the listening sockets over a crash, and may do nothing that a web service has no need of.
    """
    try:
        # Leave the environment out: the service will not have this one.
        options = gather(given, {})
        files = dict(_describe(options, given, name or _default_name(options.target), user, has_socket=socket))
    except OptionError as error:
        click.echo(f"ecdysis: {error}", err=True)
        sys.exit(Exit.USAGE)
    for file, text in files.items():
        if output is not None:
            (Path(output) / file).write_text(text, encoding="utf-8")
            click.echo(f"wrote {Path(output) / file}", err=True)
        else:
            click.echo(f"# /etc/systemd/system/{file}\n{text}")


def _describe(
    options: Options, given: Mapping[str, Any], name: str, user: str | None, *, has_socket: bool
) -> Iterator[tuple[str, str]]:
    """Name each unit file, and say what is in it.

    Raises:
        OptionError: there can be no such unit.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{,199}", name) or name.endswith((".service", ".socket")):
        raise OptionError(
            f"--name {name}: up to 200 letters, digits, '_', '.' and '-' are possible, without .service at the end"
        )
    if user is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*|[0-9]+", user):
        raise OptionError(f"--user {user!r}: say a user's name or number")
    if options.keyfile_password is not None or any("password" in name for name in options.server_options):
        raise OptionError(
            "a unit is there for everybody to read, and so is a command line: put the password into a file of 0600 as "
            "ECDYSIS_KEYFILE_PASSWORD=…, and name that by --env-file"
        )
    if options.control.lower() in OFF:
        raise OptionError("--control off: systemctl reload asks the service by its control socket")
    directory = f"/run/{name}"
    # A mere name would mean another place for the service, which systemd tells of its directory, than for a shell.
    if options.control == "auto" or os.sep not in options.control:
        control = f"{directory}/{'control' if options.control == 'auto' else options.control}"
    else:
        control = options.control_path or ""
    arguments = [*_arguments({**given, "control": None}), "--control", control]
    command = [sys.executable, "-m", "ecdysis_async.cli"]
    places = _places(options)
    if user is None and all(map(_is_open, places)):
        identity = "# A user that exists while the service does.\nDynamicUser=yes\n"
    elif user is None:
        user = _owner(next(place for place in places if not _is_open(place)))
        identity = (
            f"# Nobody but {user} can read the program where it is. Elsewhere (/opt, /srv) it could run with\n"
            "# DynamicUser=yes.\n"
            f"User={user}\n"
        )
    else:
        identity = f"User={user}\n"
    # A dynamic user's would be in /run/private, where nobody else can reach it.
    identity = ("RuntimeDirectoryPreserve=restart\n\n" if user is not None else "\n") + identity
    ports = [address.port for address in options.bind if isinstance(address, Internet)]
    capability = "CAP_NET_BIND_SERVICE" if not has_socket and any(0 < port < FIRST_FREE_PORT for port in ports) else ""
    paths = [address.path for address in options.bind if isinstance(address, Unix) and not address.path.startswith("@")]
    paths = [] if has_socket else paths
    written = {os.path.dirname(os.path.abspath(path)) for path in (*paths, options.pid_file, control) if path}
    written = {path for path in written if path != directory and not path.startswith(directory + "/")}
    for missing in sorted(path for path in written if not os.path.isdir(path)):
        raise OptionError(f"there is no directory {missing}: make it, or use {directory}, which systemd makes")
    if options.control_group is not None:
        # To give the socket to that group, the service has to be in it.
        identity += f"SupplementaryGroups={_escape(options.control_group)}\n"
    is_passed = options.control_group is not None or any(path.startswith(directory) for path in paths)
    sockets = f"Requires={name}.socket\nAfter={name}.socket\n" if has_socket else ""
    hides_home = "read-only" if _are_in(places, HOMES) else "yes"
    hides_temporary = "no" if _are_in([*places, *written], TEMPORARY) else "yes"
    environment = [f"PYTHONPATH={os.environ['PYTHONPATH']}"] if os.environ.get("PYTHONPATH") else []
    working_directory = os.environ.get("PWD", "")
    if not (os.path.isabs(working_directory) and os.path.samefile(working_directory, ".")):
        working_directory = os.getcwd()
    yield (
        f"{name}.service",
        f"""\
[Unit]
Description={_escape(options.target)}, by ecdysis run
Wants=network-online.target
After=network-online.target
{sockets}
[Service]
Type=notify
NotifyAccess=main
ExecStart={_join(*command, "run", *arguments)}
# It waits for the verdict, and fails where the new release does; the old one serves on then.
ExecReload={_join(*command, "restart", "--control", control)}
WorkingDirectory={_escape(working_directory)}
{"".join(f"Environment={_quote(each)}{chr(10)}" for each in environment)}\
# The main process tells the others to stop.
KillMode=mixed
Restart=on-failure
# A wrong option stays wrong.
RestartPreventExitStatus=2
TimeoutStartSec={options.ready_timeout + START_LEEWAY:g}
TimeoutStopSec={options.drain_timeout + options.exit_timeout + options.lame_duck + STOP_LEEWAY:g}
TimeoutAbortSec=10
WatchdogSec={WATCHDOG_SECONDS}
# Clients wait there for the next start, after a crash.
FileDescriptorStoreMax={STORED}
# The kernel may kill a worker, which is replaced then, without systemd ending the service.
OOMPolicy=continue
LimitNOFILE=65536
RuntimeDirectory={name}
RuntimeDirectoryMode={"0755" if is_passed else "0700"}
{identity}\
CapabilityBoundingSet={capability}
AmbientCapabilities={capability}
ProtectHome={hides_home}
PrivateTmp={hides_temporary}
{"".join(f"ReadWritePaths={_quote(each)}{chr(10)}" for each in sorted(written))}\
{HARDENING}
[Install]
WantedBy=multi-user.target
""",
    )
    if has_socket:
        mode = f"SocketMode={options.unix_mode:04o}\n" if options.unix_mode is not None else ""
        yield (
            f"{name}.socket",
            f"""\
[Unit]
Description=Sockets of {name}.service

[Socket]
{"".join(f"ListenStream={_listen(address)}{chr(10)}" for address in options.bind)}\
BindIPv6Only=ipv6-only
Backlog={options.backlog}
{mode}
[Install]
WantedBy=sockets.target
""",
        )


def _default_name(target: str) -> str:
    return target.partition(":")[0].replace(".", "-").replace("_", "-")


def _arguments(given: Mapping[str, Any]) -> Iterator[str]:
    """Write the options as they were given."""
    for parameter in run.params:
        value = given.get(parameter.name or "")
        if value is None or value == ():
            continue
        if isinstance(parameter, click.Argument):
            yield str(value)
        elif isinstance(value, bool):
            yield parameter.opts[0] if value else parameter.secondary_opts[0]
        else:
            long = next(each for each in parameter.opts if each.startswith("--"))
            for each in value if isinstance(value, tuple) else (value,):
                # As one word, so that a value may begin with a hyphen.
                yield f"{long}={each}"


def _places(options: Options) -> list[str]:
    """Return where the program is: its code, its interpreter and its packages."""
    places = (os.getcwd(), options.app_dir, sys.executable, sys.base_prefix, str(Path(__file__).parents[1]))
    more = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    files = (options.env_file, options.certfile, options.keyfile, options.ca_certs, options.log_config)
    return [os.path.abspath(place) for place in (*places, *more, *files) if place]


def _is_open(path: str) -> bool:
    """Say whether every user may read what is there."""
    bits = [os.stat(path).st_mode & stat.S_IROTH]
    resolved = Path(path).resolve()
    bits += [parent.stat().st_mode & stat.S_IXOTH for each in (Path(path), resolved) for parent in each.parents]
    return all(bits)


def _owner(path: str) -> str:
    number = os.stat(path).st_uid
    try:
        return pwd.getpwuid(number).pw_name
    # It has no name here, and systemd takes numbers as well.
    except KeyError:
        return str(number)


def _are_in(places: list[str], directories: tuple[str, ...]) -> bool:
    found = {*places, *map(os.path.realpath, places)}
    return any(place == each or place.startswith(each + "/") for place in found for each in directories)


def _listen(address: Internet | Unix | Descriptor) -> str:
    match address:
        case Descriptor():
            raise OptionError(f"--bind {address}: with --socket say where to listen, such as --bind 127.0.0.1:8000")
        case Internet(host=host, port=0):
            raise OptionError(f"--bind {host}:0: a socket unit needs a port")
        case Internet(host=host) if host and not _is_numeric(host):
            raise OptionError(f"--bind {address}: systemd looks no names up; with --socket say an IP address")
        case Internet(host=host, port=port):
            return str(Internet(host or "0.0.0.0", port))  # noqa: S104 - what no host stands for
        case Unix(path=path):
            return _escape(path if path.startswith("@") else os.path.abspath(path))


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _escape(text: str) -> str:
    return text.replace("%", "%%")


def _quote(text: str) -> str:
    """Write a word as systemd.service(5) reads it."""
    text = _escape(text).replace("\\", "\\\\")
    if re.search(r"[\s\"';]", text) or not text:
        text = '"' + text.replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t") + '"'
    return text


def _join(*words: str) -> str:
    # A dollar is special in command lines only.
    return " ".join(_quote(word).replace("$", "$$") for word in words)


unit = click.Command(
    "unit",
    callback=_unit,
    params=[
        *run.params,
        click.Option(["--name"], metavar="NAME", help="What the unit is called. [default: TARGET's module]"),
        click.Option(
            ["--user"], metavar="USER", help="Who runs it. [default: a dynamic user, or who alone can read the program]"
        ),
        click.Option(["--socket"], is_flag=True, help="Let systemd listen: a socket unit as well."),
        click.Option(
            ["--output"],
            metavar="DIRECTORY",
            type=click.Path(exists=True, file_okay=False),
            help="Write the files there, such as /etc/systemd/system, instead of printing them.",
        ),
    ],
    help=_unit.__doc__,
    short_help="Print a unit of systemd for a service.",
    epilog="The other options are those of `ecdysis run`, and become its command line.",
)
