"""``ecdysis unit``: the unit files of systemd for a service of ``ecdysis run``, complete and hardened.

What is printed is meant to be read, changed and kept; nothing of it is needed at run time.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import pwd
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ecdysis_async._anchor.metrics_files import AUTO
from ecdysis_async._config.foreign import translate
from ecdysis_async._config.gather import gather
from ecdysis_async._config.options import OptionError, Options
from ecdysis_async._config.parsing import OFF
from ecdysis_async._config.target import require_source
from ecdysis_async._management.systemd_unit import knows_descriptor_store
from ecdysis_async._sockets.addresses import Descriptor, Internet, Unix
from ecdysis_async.errors import StartupError

from .output import Exit, let_readers_leave
from .places import find_directory, find_interpreter, find_links, find_places, find_python_path, name_project
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

# Of a Unix socket that every user may connect to, as to a port of 127.0.0.1; a socket unit's default as well.
EVERYBODY = 0o666

# How much of a difference is shown.
GIST_LINES = 10

# Where units of packages are, which one in /etc would hide.
VENDORS = ("/lib/systemd/system", "/usr/lib/systemd/system")

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


def _unit(name: str | None, user: str | None, *, socket: bool, output: str | None, force: bool, **given: Any) -> None:
    """Print a unit of systemd for `ecdysis run TARGET` with these options.

    It waits for readiness, reloads without losing a connection and fails the reload where the new release does,
    keeps the listening sockets over a crash, and may do nothing that a web service has no need of.
    """
    let_readers_leave()
    try:
        given = translate(given)
        # Leave the environment out: the service will not have this one.
        options = gather(given, {})
        require_source(options.target, options.app_dir)
        name = name or name_project(find_directory(), options.target)
        plan = _plan(options, given, name, user, has_socket=socket)
        files = dict(_describe(plan))
        if output is not None:
            _write(Path(output), files, force=force)
    except (OptionError, StartupError) as error:
        click.echo(f"ecdysis: {error}", err=True)
        sys.exit(Exit.USAGE)
    except OSError as error:
        click.echo(f"ecdysis: {error.filename or output}: {error.strerror or error}", err=True)
        sys.exit(Exit.FAILED)
    if output is None:
        for file, text in files.items():
            click.echo(f"# /etc/systemd/system/{file}\n{text}")
    for line in _advise(plan, output):
        click.echo(line, err=True)


@dataclass(frozen=True)
class _Plan:
    """What a unit is made of.

    Attributes:
        name: of the unit.
        options: what is served, and how.
        arguments: those of ``ecdysis run``.
        control: the path of the control socket.
        directory: where the service starts, by way of links.
        runtime: the directory below /run that systemd makes for the service.
        user: who runs it; None: a user that exists while the service does.
        reason: why that user does, as a comment.
        has_socket: whether systemd listens.
        places: where the program is.
        written: directories that the service has to write to, and systemd does not make.
        runtime_paths: the paths of Unix sockets of the service itself in ``runtime``.
        keeps_descriptors: whether systemd here knows how to keep sockets over a crash.
    """

    name: str
    options: Options
    arguments: Sequence[str]
    control: str
    directory: str
    runtime: str
    user: str | None
    reason: str
    has_socket: bool
    places: Sequence[str]
    written: Sequence[str]
    runtime_paths: Sequence[str]
    keeps_descriptors: bool


def _plan(options: Options, given: Mapping[str, Any], name: str, user: str | None, *, has_socket: bool) -> _Plan:
    """Work out what the unit has to be.

    Raises:
        OptionError: there can be no such unit.
    """
    _check_names(name, user)
    _check_secrets(options)
    if options.control.lower() in OFF:
        raise OptionError("--control off: systemctl reload asks the service by its control socket")
    paths = _find_paths(options.bind)
    runtime = name
    # systemd removes the service's directory with the service, and a socket unit's path must outlive that.
    if has_socket and any(_is_below(path, f"/run/{name}") for path in paths):
        runtime = f"{name}-control"
    own_paths = [*([] if has_socket else paths), *_find_paths([options.health_bind])]
    # A mere name would mean another place for the service, which systemd tells of its directory, than for a shell.
    if options.control == "auto" or os.sep not in options.control:
        control = f"/run/{runtime}/{'control' if options.control == 'auto' else options.control}"
    else:
        control = options.control_path or ""
    arguments = [*_arguments({**given, "control": None}), "--control", control]
    if paths and not has_socket and options.unix_mode is None and options.unix_group is None:
        arguments.append(f"--unix-mode={EVERYBODY:o}")
    directory = find_directory()
    places = find_places(options, directory)
    reason = ""
    if user is None and not all(map(_is_open, places)):
        user = _owner(next(place for place in places if not _is_open(place)))
        reason = (
            f"# Nobody but {user} can read the program where it is. Elsewhere (/opt, /srv) it could run with\n"
            "# DynamicUser=yes.\n"
        )
    metrics = options.metrics_dir if options.metrics_dir != AUTO else None
    files = [os.path.abspath(path) for path in (*own_paths, options.pid_file, metrics, control) if path]
    made = (f"/run/{runtime}", f"/var/lib/{name}")
    written = {os.path.dirname(path) for path in files if not any(_is_below(path, each) for each in made)}
    for path in sorted(written):
        if not os.path.isdir(path):
            raise OptionError(f"there is no directory {path}: make it, or use /run/{runtime}, which systemd makes")
        if not _may_write(path, user):
            raise OptionError(
                f"{user or 'a dynamic user'} may not write to {path}: use /run/{runtime}, which systemd makes for the "
                "service, or say who may by --user" + ("" if has_socket else "; with --socket systemd itself listens")
            )
    return _Plan(
        name=name,
        options=options,
        arguments=arguments,
        control=control,
        directory=directory,
        runtime=runtime,
        user=user,
        reason=reason,
        has_socket=has_socket,
        places=places,
        written=sorted(written),
        runtime_paths=[path for path in own_paths if _is_below(path, f"/run/{runtime}")],
        keeps_descriptors=knows_descriptor_store(),
    )


def _check_names(name: str, user: str | None) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{,199}", name) or name.endswith((".service", ".socket")):
        raise OptionError(
            f"--name {name}: up to 200 letters, digits, '_', '.' and '-' are possible, without .service at the end"
        )
    if user is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*|[0-9]+", user):
        raise OptionError(f"--user {user!r}: say a user's name or number")


def _check_secrets(options: Options) -> None:
    words = [*options.server_options, *(options.command or ())]
    if options.keyfile_password is not None or any("password" in word for word in words):
        raise OptionError(
            "a unit is there for everybody to read, and so is a command line: put the password into a file of 0600 as "
            "ECDYSIS_KEYFILE_PASSWORD=…, and name that by --env-file"
        )


def _describe(plan: _Plan) -> Iterator[tuple[str, str]]:
    """Name each unit file, and say what is in it.

    Raises:
        OptionError: there can be no such unit.
    """
    options, name = plan.options, plan.name
    command = [find_interpreter(), "-m", "ecdysis_async.cli"]
    sockets = f"Requires={name}.socket\nAfter={name}.socket\n" if plan.has_socket else ""
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
ExecStart={_join(*command, "run", *plan.arguments)}
# It waits for the verdict, and fails where the new release does; the old one serves on then.
ExecReload={_join(*command, "restart", "--control", plan.control)}
{_describe_directory(plan.directory)}\
# The main process tells the others to stop.
KillMode=mixed
Restart=on-failure
# A wrong option stays wrong.
RestartPreventExitStatus=2
TimeoutStartSec={options.ready_timeout + START_LEEWAY:g}
TimeoutStopSec={options.drain_timeout + options.exit_timeout + options.lame_duck + STOP_LEEWAY:g}
TimeoutAbortSec=10
WatchdogSec={WATCHDOG_SECONDS}
{_describe_store(plan)}\
# The kernel may kill a worker, which is replaced then, without systemd ending the service.
OOMPolicy=continue
LimitNOFILE=65536
{_describe_files(plan)}
{_describe_user(plan)}\
{HARDENING}{_describe_exceptions(plan)}
[Install]
WantedBy=multi-user.target
""",
    )
    if plan.has_socket:
        yield f"{name}.socket", _describe_socket(plan)


def _describe_directory(directory: str) -> str:
    lines = []
    if os.path.realpath(directory) != directory:
        lines.append("# A link is in this path. Each start and each reload follows it to the release of that time.")
    lines.append(f"WorkingDirectory={_escape(directory)}")
    if os.path.realpath(directory) != directory:
        lines.append(f"Environment={_quote(f'PWD={directory}')}")
    if path := find_python_path():
        lines.append(f"Environment={_quote(f'PYTHONPATH={path}')}")
    return "".join(f"{line}\n" for line in lines)


def _describe_store(plan: _Plan) -> str:
    if not plan.keeps_descriptors:
        return (
            "# This systemd is older than 254, and keeps no sockets over a crash: clients are refused until the next\n"
            "# start, unless a socket unit listens (ecdysis unit --socket).\n"
        )
    return f"# Clients wait there for the next start, after a crash.\nFileDescriptorStoreMax={STORED}\n"


def _describe_files(plan: _Plan) -> str:
    """Say what the service may write to, and what others may reach."""
    name, runtime = plan.name, plan.runtime
    is_passed = plan.options.control_group is not None or bool(plan.runtime_paths)
    lines = [
        f"# systemd makes two directories for the service: /run/{runtime} for its sockets, and /var/lib/{name}, which",
        "# $STATE_DIRECTORY names, for its data. All else is read-only to the service: what its user may change",
        "# elsewhere needs a line such as ReadWritePaths=/srv/uploads. For log files there is LogsDirectory=.",
        f"RuntimeDirectory={runtime}",
        f"RuntimeDirectoryMode={'0755' if is_passed else '0700'}",
    ]
    # A dynamic user's would be in /run/private then, where nobody else can reach it.
    if plan.user is not None:
        lines.append("RuntimeDirectoryPreserve=restart")
    lines += [f"StateDirectory={name}", "StateDirectoryMode=0750"]
    lines += [f"ReadWritePaths={_quote(each)}" for each in plan.written]
    lines.append(f"ProtectHome={'read-only' if _are_in(plan.places, HOMES) else 'yes'}")
    lines.append(f"PrivateTmp={'no' if _are_in([*plan.places, *plan.written], TEMPORARY) else 'yes'}")
    return "".join(f"{line}\n" for line in lines)


def _describe_user(plan: _Plan) -> str:
    options = plan.options
    lines = [f"{plan.reason}User={plan.user}"]
    if plan.user is None:
        lines = ["# A user that exists while the service does.", "DynamicUser=yes"]
    # To give a socket to a group, the service has to be in it.
    groups = [options.control_group, None if plan.has_socket else options.unix_group]
    lines += [f"SupplementaryGroups={_escape(each)}" for each in dict.fromkeys(groups) if each is not None]
    addresses = [options.health_bind, *(() if plan.has_socket else options.bind)]
    ports = [address.port for address in addresses if isinstance(address, Internet)]
    capability = "CAP_NET_BIND_SERVICE" if any(0 < port < FIRST_FREE_PORT for port in ports) else ""
    lines += [f"CapabilityBoundingSet={capability}", f"AmbientCapabilities={capability}"]
    return "".join(f"{line}\n" for line in lines)


def _describe_exceptions(plan: _Plan) -> str:
    if plan.options.control_group is None and (plan.has_socket or plan.options.unix_group is None):
        return ""
    return "# The sockets are given to their group.\nSystemCallFilter=@chown\n"


def _describe_socket(plan: _Plan) -> str:
    options = plan.options
    lines = [f"ListenStream={_listen(address)}" for address in options.bind]
    if paths := _find_paths(options.bind):
        permissions = options.unix_permissions
        lines += [f"SocketMode={EVERYBODY if permissions['mode'] is None else permissions['mode']:04o}"]
        if options.unix_group is not None:
            lines.append(f"SocketGroup={_escape(options.unix_group)}")
        lines.append("# No path is left where nobody listens.")
        lines.append("RemoveOnStop=yes")
    if len(paths) < len(options.bind):
        lines.append("BindIPv6Only=ipv6-only")
    lines.append(f"Backlog={options.backlog}")
    return f"""\
[Unit]
Description=Sockets of {plan.name}.service

[Socket]
{"".join(f"{line}{chr(10)}" for line in lines)}
[Install]
WantedBy=sockets.target
"""


def _advise(plan: _Plan, output: str | None) -> Iterator[str]:
    """Say what is to be known, and to be done, besides what stands in the unit."""
    name, options = plan.name, plan.options
    for link in find_links(plan.directory):
        yield (
            f"ecdysis: this unit stays with {plan.directory} when {link} leads elsewhere: to follow the link, "
            f"cd {link} and run `ecdysis unit` there"
        )
    if _find_paths(options.bind) and options.unix_mode is None and options.unix_group is None:
        yield (
            "ecdysis: every user of this machine may connect to the Unix socket, as to a port of 127.0.0.1; for the "
            "proxy alone say --unix-group with the group of its user (www-data or nginx)"
        )
    if plan.user is not None and not plan.user.isdecimal() and not _exists(plan.user):
        yield f"ecdysis: there is no user {plan.user} here: useradd --system {plan.user}"
    if output is None:
        return
    if not plan.has_socket and (Path(output) / f"{name}.socket").exists():
        yield (
            f"ecdysis: {Path(output) / name}.socket is there from before, and listens: "
            f"systemctl disable --now {name}.socket, and remove it"
        )
    units = f"{name}.socket {name}.service" if plan.has_socket else f"{name}.service"
    yield (
        f"next: systemctl daemon-reload && systemctl enable --now {units}; then ecdysis status --control {plan.control}"
    )


def _write(directory: Path, files: Mapping[str, str], *, force: bool) -> None:
    """Write the files, each whole or not at all; what is there already and differs is written over only by force.

    Raises:
        OptionError: something else is there.
        OSError: they cannot be written.
    """
    there = {file: (directory / file).read_text("utf-8", "replace") for file in files if (directory / file).exists()}
    if not force:
        for file in files:
            foreign = next((each for each in VENDORS if os.path.exists(os.path.join(each, file))), None)
            if foreign is not None and file not in there and not os.path.samefile(foreign, directory):
                raise OptionError(f"systemd has a {file} already, in {foreign}: take another --name, or say --force")
        changed = [file for file, text in there.items() if text != files[file]]
        if changed:
            raise OptionError(
                "".join(_compare(directory / file, there[file], files[file]) for file in changed).rstrip()
            )
    for file, text in files.items():
        path = directory / file
        if there.get(file) == text:
            click.echo(f"{path} is as it would be written", err=True)
            continue
        draft = path.with_name(f".{file}.draft")
        try:
            draft.write_text(text, encoding="utf-8")
            draft.chmod(0o644)
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        click.echo(f"wrote {path}" + (", over another one" if file in there else ""), err=True)


def _compare(path: Path, there: str, new: str) -> str:
    lines = [
        line
        for line in difflib.unified_diff(there.splitlines(), new.splitlines(), n=0, lineterm="")
        if not line.startswith(("---", "+++", "@@"))
    ]
    more = f"\n  … and {len(lines) - GIST_LINES} more lines" if len(lines) > GIST_LINES else ""
    gist = "".join(f"\n  {line}" for line in lines[:GIST_LINES])
    return f"{path} is there, and differs: say --name for another unit, or --force to replace it{gist}{more}"


def _find_paths(addresses: Iterable[Internet | Unix | Descriptor | None]) -> list[str]:
    """Return the paths of the Unix sockets among addresses, absolute ones."""
    paths = [each.path for each in addresses if isinstance(each, Unix)]
    return [os.path.abspath(path) for path in paths if not path.startswith("@")]


def _is_below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory + os.sep)


def _may_write(directory: str, user: str | None) -> bool:
    """Say whether a user may make files in a directory, as far as its permissions tell."""
    found = os.stat(directory)
    if user is None:
        return bool(found.st_mode & stat.S_IWOTH)
    try:
        entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    # The unit may be meant for another machine.
    except KeyError:
        return True
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    if entry.pw_uid in (0, found.st_uid):
        return entry.pw_uid == 0 or bool(found.st_mode & stat.S_IWUSR)
    return bool(found.st_mode & (stat.S_IWGRP if found.st_gid in groups else stat.S_IWOTH))


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


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


def _are_in(places: Sequence[str], directories: tuple[str, ...]) -> bool:
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


_OWN = [
    click.Option(
        ["--name"],
        metavar="NAME",
        help="What the unit is called. [default: the project's name in pyproject.toml, or its directory's]",
    ),
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
    click.Option(["--force"], is_flag=True, help="With --output, replace files that are there and differ."),
]
_FLAGS = {flag for parameter in _OWN for flag in parameter.opts}

unit = click.Command(
    "unit",
    callback=_unit,
    # What other servers call by the same names, and `ecdysis run` answers, is meant for the unit here.
    params=[*(each for each in run.params if not _FLAGS & {*each.opts}), *_OWN],
    help=_unit.__doc__,
    short_help="Print a unit of systemd for a service.",
    epilog="The other options are those of `ecdysis run`, and become its command line.",
)
