"""How an anchor comes to be: as the first one, as the new code of one that runs, or in the place of another process."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import logging
import os
import pickle
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anyio

from ecdysis_async._anchor import reexec
from ecdysis_async._anchor.anchor import STARTUP_FAILED, Anchor
from ecdysis_async._anchor.config import AnchorConfig, HealthPage
from ecdysis_async._anchor.needs import OPENING_ERRORS, explain_failure
from ecdysis_async._anchor.rehearsal import rehearse
from ecdysis_async._anchor.reload import Watched, require_watchfiles
from ecdysis_async._anchor.takeover import UNREADABLE, ask_for_service
from ecdysis_async._config.gather import find_control_path
from ecdysis_async._config.logging import configure_logging
from ecdysis_async._config.options import DEFAULT_BIND, OptionError, Options
from ecdysis_async._config.parsing import OFF
from ecdysis_async._config.prometheus import require_prometheus_client
from ecdysis_async._handoff.preflight import CheckFailed, preflight
from ecdysis_async._management.control_path import locate
from ecdysis_async._management.takeover import FormerService
from ecdysis_async._management.tracing import require_opentelemetry
from ecdysis_async._sockets.registry import listen
from ecdysis_async._system.launch import describe_launch, find_from_start, find_start_link
from ecdysis_async._system.process import find_missing
from ecdysis_async._system.signals import unblock_all_signals
from ecdysis_async._system.stderr import say
from ecdysis_async._system.wording import speak_of_options
from ecdysis_async.errors import RestartError, StartupError, TakeoverFailed
from ecdysis_async.settings import Settings

__all__ = ["find_tried_options", "make_config", "run", "serve"]

logger = logging.getLogger("ecdysis_async")

USAGE = 2

# How long the workers of an anchor that has died may take to close their addresses, and between two looks, seconds.
ADDRESSES_SECONDS = 5.0
ADDRESSES_PAUSE_SECONDS = 0.05

# With --reload, the longest probation, seconds: a developer who saves a file again does not want to wait.
RELOAD_PROBATION_SECONDS = 0.2


def run(options: Options) -> int:
    """Run the service of `ecdysis run` until it is stopped; return the exit status."""
    is_next_code = reexec.is_next_code()
    set_up_logging = None
    try:
        configure_logging(options)
    except OptionError as error:
        if not is_next_code:
            say(str(error))
            return USAGE
        # Workers serve, and nobody else would look after them.
        set_up_logging = functools.partial(configure_logging, options)
        configure_logging(Options.restore({**options.values, "log_config": None}))
    control_path = find_control_path(options)
    if not is_next_code:
        _warn_of_what_goes_with_its_release(options)
    for name, without, require in (
        ("reload", False, require_watchfiles),
        ("metrics_dir", None, require_prometheus_client),
        ("traces", False, require_opentelemetry),
    ):
        try:
            if getattr(options, name):
                require()
        except StartupError as error:
            if not is_next_code:
                say(str(error))
                return STARTUP_FAILED
            logger.error("the service goes on without --%s: %s", name.replace("_", "-"), error)  # noqa: TRY400
            options = Options.restore({**options.values, name: without})
    if options.reload and control_path is None and not is_next_code:
        say("--reload restarts the service by its control socket: give it one (--control PATH)")
        return STARTUP_FAILED
    config = dataclasses.replace(make_config(options, control_path), set_up_logging=set_up_logging)
    tried = {**options.values, "control": control_path if control_path is not None else OFF[0]}
    return serve(config, lambda: reexec.tell_options(base64.b64encode(pickle.dumps(tried)).decode(), control_path))


def _warn_of_what_goes_with_its_release(options: Options) -> None:
    """Say so where files that are to stay lie in a release, which is deleted some day."""
    inside = []
    # A bare name of a control socket is one in the default directory.
    if os.sep in options.control and not os.path.isabs(options.control):
        inside.append(f"--control {options.control}")
    if options.pid_file is not None and not os.path.isabs(options.pid_file):
        inside.append(f"--pid-file {options.pid_file}")
    if inside and (link := find_start_link()) is not None:
        logger.warning(
            "%s: relative, and so in the release to which %s leads now. Restarts leave it there, and it goes when that "
            "release is deleted: give an absolute path elsewhere",
            ", ".join(inside),
            link,
        )


def find_tried_options() -> Options | None:
    """Return the options that a check has tried before this process was executed as the new code of an anchor.

    None where there was no such check, or by another release than the one that is installed by now.
    """
    text = reexec.find_options()
    try:
        # The sealed memory is this process' own, from before its exec.
        return Options.restore(pickle.loads(base64.b64decode(text))) if text is not None else None  # noqa: S301
    except Exception:
        # What another release has written may raise anything.
        logger.exception("the options that were tried are of another release, and are read anew")
        return None


def serve(config: AnchorConfig, tell_tried: Callable[[], None] | None = None) -> int:
    """Run a service until it is stopped; return the exit status of this process.

    Args:
        config: what it runs.
        tell_tried: where this process only tries that, tells the process that asked what was tried.
    """
    speak_of_options()
    found = None
    try:
        found = reexec.claim()
        if found is not None and found.is_check:
            reexec.try_state(config, found.state)
            # This process is a child of the one that is to run the new code.
            status = _rehearse(config, found.state, os.getppid())
            if status == 0 and tell_tried is not None:
                tell_tried()
            return status
        if found is None:
            unblock_all_signals()
            if (missing := find_missing()) is not None:
                say(
                    f"{missing}. `ecdysis run` starts its workers, and restarts them, by it: allow it, or serve "
                    "without restarts by the server's own command, such as `uvicorn main:app`"
                )
                return STARTUP_FAILED
        if found is None and config.takeover is not None:
            return _take_over(config, config.takeover)
        anchor = Anchor(config, found.state if found is not None else None)
    except (KeyError, OSError, OverflowError, TypeError, ValueError, reexec.UpgradeFailed) as error:
        say(str(error) if found is None else f"this release does not take over from the one that runs: {error!r}")
        return STARTUP_FAILED
    return anyio.run(anchor.run)


def _rehearse(config: AnchorConfig, state: Mapping[str, Any], pid: int) -> int:
    """Try to open what is needed; say what cannot be, and return the exit status."""
    try:
        rehearse(config, state["sockets"], pid)
    except KeyError:
        # The state is of another form.
        raise
    except OPENING_ERRORS as error:
        say(explain_failure(error))
        return STARTUP_FAILED
    return 0


def _take_over(config: AnchorConfig, path: str) -> int:
    """Go on with the service of another anchor, and then replace its workers."""
    try:
        with contextlib.closing(FormerService(path)) as former:
            try:
                anchor = _receive_service(config, path)
            except TakeoverFailed:
                if not former.has_died():
                    raise
                logger.warning(
                    "the service at %s (pid %d) has died before it handed over: this one starts in its place",
                    path,
                    former.pid,
                )
                _wait_for_addresses(config)
                anchor = Anchor(config)
    except TakeoverFailed as error:
        say(str(error))
        return STARTUP_FAILED
    except RestartError as error:
        # What the new release has written stands above.
        say(str(error.args[0]))
        return USAGE if isinstance(error, CheckFailed) and error.returncode == USAGE else STARTUP_FAILED
    except _NotRehearsed:
        return STARTUP_FAILED
    return anyio.run(anchor.run)


class _NotRehearsed(Exception):
    """Something that is needed cannot be opened, which was said."""


def _receive_service(config: AnchorConfig, path: str) -> Anchor:
    """Take the place of another anchor.

    Raises:
        RestartError: the new release does not start, or the former anchor goes on, or has died.
    """
    if config.is_checked_first:
        # The check comes before anything has moved. Where it fails, new workers would not start either.
        settings = config.settings
        launch, _ = describe_launch(
            settings.command, settings.environment, settings.env_file, is_bound_to_directory=True
        )
        anyio.run(functools.partial(preflight, launch, settings.ready_timeout))
    takeover = ask_for_service(path)
    if _rehearse(config, takeover.state, os.getpid()) != 0:
        raise _NotRehearsed
    try:
        anchor = Anchor(config, takeover.state, takeover.former_pid)
    except (OSError, *UNREADABLE) as error:
        raise TakeoverFailed(f"what the service at {path} hands over cannot be read: {error!r}") from error
    takeover.confirm()
    return anchor


def _wait_for_addresses(config: AnchorConfig) -> None:
    """Wait until the workers of an anchor that has died have closed their addresses, which they do at its death."""
    nothing: dict[str, Any] = {name: {"descriptions": [], "kinds": []} for name in ("service", "control", "health")}
    deadline = time.monotonic() + ADDRESSES_SECONDS
    while time.monotonic() < deadline:
        try:
            rehearse(config, nothing, os.getpid())
        except OPENING_ERRORS:
            # What else is wrong the start says.
            time.sleep(ADDRESSES_PAUSE_SECONDS)
        else:
            return


def make_config(options: Options, control_path: str | None) -> AnchorConfig:
    """Return what the anchor of `ecdysis run` is to run.

    Args:
        options: what the user wants.
        control_path: the absolute path of the control socket; None for none.
    """
    # Without --bind the first worker opens its own sockets: an `async def main` may listen elsewhere.
    addresses = options.bind if options.bind != DEFAULT_BIND else ()
    backlog, permissions = options.backlog, options.unix_permissions
    return AnchorConfig(
        {str(each): functools.partial(listen, address=each, backlog=backlog, **permissions) for each in addresses},
        workers=options.workers,
        settings=Settings(
            ready_timeout=options.ready_timeout,
            drain_timeout=options.drain_timeout,
            exit_timeout=options.exit_timeout,
            max_draining=options.max_draining,
            probation=min(options.probation, RELOAD_PROBATION_SECONDS) if options.reload else options.probation,
            pid_file=Path(options.pid_file) if options.pid_file is not None else None,
            env_file=Path(options.env_file) if options.env_file is not None else None,
            command=options.command,
        ),
        control_path=control_path,
        control_access=options.control_access,
        hang_timeout=options.hang_timeout,
        max_requests=options.max_requests,
        max_requests_jitter=options.max_requests_jitter,
        max_rss=options.max_rss,
        health=options.health_bind,
        pages=frozenset(
            page
            for page, is_wanted in {
                HealthPage.METRICS: options.metrics,
                HealthPage.STATUS: options.status_page,
            }.items()
            if is_wanted
        ),
        metrics_dir=options.metrics_dir,
        traces=options.traces,
        lame_duck=options.lame_duck,
        reload=_find_watched(options),
        takeover=locate(options.takeover) if options.takeover is not None else None,
        one_at_a_time=options.one_at_a_time,
        # An import may open what the running release still has open.
        is_checked_first=not options.one_at_a_time,
    )


def _find_watched(options: Options) -> Watched | None:
    if not options.reload:
        return None
    files = [find_from_start(path) for path in (options.env_file, options.config) if path is not None]
    paths = (*map(find_from_start, options.reload_dirs or (options.app_dir,)), *files)
    return Watched(paths, options.reload_include, options.reload_exclude)
