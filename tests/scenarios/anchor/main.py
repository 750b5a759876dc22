"""An anchor over workers of tests/scenarios/handoff/service.py, run as ``main.py SETTINGS``; see harness.py."""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path

from ecdysis_async._anchor.config import AnchorConfig
from ecdysis_async._sockets.addresses import Internet, Unix
from ecdysis_async._sockets.registry import Registry
from ecdysis_async.cli import anchor as start
from ecdysis_async.settings import Settings

# What a worker asks its `Ecdysis` for by these methods.
ADDRESSES: dict[str, type[Internet | Unix]] = {"listen_tcp": Internet, "listen_unix": Unix}

WORKER = Path(__file__).parents[1] / "handoff" / "service.py"

with open(sys.argv[1], encoding="utf-8") as settings_file:
    SETTINGS = json.load(settings_file)


def open_sockets(registry: Registry) -> None:
    """Open what the workers will ask for, unless they shall do it themselves."""
    if SETTINGS["opens"]:
        for method, arguments, named in SETTINGS["listeners"]:
            registry.obtain(ADDRESSES[method](*arguments), **named)


if __name__ == "__main__":
    # Python begins so in a terminal; in the background of a shell it inherits that SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Code of the test's own, run in the anchor, and in whatever it becomes.
    exec(SETTINGS["at_anchor"])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    command = (sys.executable, "-W", "error", str(WORKER), sys.argv[1])
    settings = Settings(**SETTINGS["handoffs"], command=command, pid_file=Path(SETTINGS["pid_file"]))
    plan = AnchorConfig(
        {"everything": open_sockets}, settings=settings, control_path=SETTINGS["control"], **SETTINGS["plan"]
    )
    sys.exit(start.serve(plan))
