"""How an anchor comes to be: as the first one, as the new code of one that runs, or in the place of another process."""

from __future__ import annotations

import functools

import anyio

from ecdysis_async._anchor import reexec
from ecdysis_async._anchor.anchor import STARTUP_FAILED, Anchor
from ecdysis_async._anchor.config import AnchorConfig, make_config
from ecdysis_async._anchor.reload import require_watchfiles
from ecdysis_async._anchor.takeover import ask_for_service
from ecdysis_async._config.logging import configure_logging
from ecdysis_async._config.options import OptionError, Options, find_control_path
from ecdysis_async._handoff.preflight import preflight
from ecdysis_async._system.launch import describe_launch
from ecdysis_async._system.stderr import say
from ecdysis_async.errors import RestartError, StartupError, TakeoverFailed

__all__ = ["run", "serve"]

USAGE = 2


def run(options: Options) -> int:
    """Run the service of `ecdysis run` until it is stopped; return the exit status."""
    try:
        configure_logging(options)
    except OptionError as error:
        say(str(error))
        return USAGE
    control_path = find_control_path(options)
    if options.reload:
        try:
            require_watchfiles()
        except StartupError as error:
            say(str(error))
            return STARTUP_FAILED
        if control_path is None:
            say("--reload restarts the service by its control socket: give it one (--control PATH)")
            return STARTUP_FAILED

    return serve(make_config(options, control_path))


def serve(plan: AnchorConfig) -> int:
    """Run a service until it is stopped; return the exit status of this process."""
    try:
        found = reexec.claim()
        if found is not None and found.is_check:
            reexec.try_state(found.state)
            return 0
        if found is None and plan.takeover is not None:
            return _take_over(plan, plan.takeover)
        anchor = Anchor(plan, found.state if found is not None else None)
    except (KeyError, OSError, TypeError, ValueError, reexec.UpgradeFailed) as error:
        say(f"this release does not take over from the one that runs: {error!r}")
        return STARTUP_FAILED
    return anyio.run(anchor.run)


def _take_over(plan: AnchorConfig, path: str) -> int:
    """Go on with the service of another anchor, and then replace its workers."""
    try:
        if plan.is_checked_first:
            # Before anything has moved: its workers would not start anyway.
            settings = plan.settings
            launch, _ = describe_launch(settings.command, settings.environment, settings.env_file)
            anyio.run(functools.partial(preflight, launch, settings.ready_timeout))
        succession = ask_for_service(path)
        anchor = Anchor(plan, succession.state, succession.former_pid)
        succession.confirm()
    except TakeoverFailed as error:
        say(str(error))
        return STARTUP_FAILED
    except RestartError as error:
        # What it has written stands above.
        say(str(error.args[0]))
        return STARTUP_FAILED
    return anyio.run(anchor.run)
