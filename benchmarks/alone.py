"""What a worker of `ecdysis run` serves, in one process without an anchor: `python -m benchmarks.alone SERVER`.

Instructions are counted of it: the simulator that counts them does not know all of the system calls of an anchor.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from typing import Any

import ecdysis_async
from ecdysis_async import Ecdysis
from ecdysis_async._config.options import Options
from ecdysis_async._config.parsing import parse_addresses

from .hello import app, make_aiohttp
from .steady import QUIET, TRUSTS_NOBODY


async def serve(server: str, options: Options) -> None:
    """Serve to the end."""
    async with Ecdysis() as ecdysis:
        adapter = importlib.import_module(f"ecdysis_async.servers.{server}")
        await adapter.run(ecdysis, make_aiohttp() if server == "aiohttp" else app, options)


def main(server: str, loop: Any, port: str, *others: str) -> None:
    """Serve on a loop; others are the options of a server, as `NAME=VALUE`, and two of `ecdysis run`."""
    logging.basicConfig(level="WARNING")
    options = Options(
        target="benchmarks.hello:app",
        bind=parse_addresses(f"127.0.0.1:{port}"),
        server_options=dict(each.split("=", 1) for each in others if "=" in each),
        access_log=QUIET not in others,
        proxy_headers=TRUSTS_NOBODY not in others,
    )
    ecdysis_async.run(functools.partial(serve, server, options), loop=loop)


if __name__ == "__main__":
    main(*sys.argv[1:])
