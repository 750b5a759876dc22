"""`ecdysis check`: the new release is started here, and compared with the service that runs, if one does."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence

import anyio

from ecdysis_async._handoff.preflight import CheckFailed, preflight
from ecdysis_async._management.control_path import is_live
from ecdysis_async._system.launch import Launch
from ecdysis_async.errors import RestartError

from . import client
from .client import CommandFailed, Event
from .output import Exit

__all__ = ["check"]

USAGE = 2


def check(arguments: Sequence[str], timeout: float) -> Event:
    """Check a release by the arguments of ``ecdysis run``; return what it is, and what a restart would change.

    Raises:
        CommandFailed: it does not pass.
    """
    command = (sys.executable, "-m", "ecdysis_async.cli", "run", *arguments)
    launch = Launch(command, None, dict(os.environ))
    try:
        release = anyio.run(functools.partial(preflight, launch, timeout))
    except CheckFailed as error:
        # It has written what is wrong with its options.
        code = Exit.USAGE if error.returncode == USAGE else Exit.FAILED
        raise CommandFailed(str(error.args[0]), code) from error
    except RestartError as error:
        raise CommandFailed(str(error), Exit.FAILED) from error
    path = release.get("control")
    if path is not None and is_live(path):
        return client.compare(path, release)
    # Digests of nothing that could be compared.
    return {**release, "environment": None}
