"""A server of ours in one process: `python -m benchmarks.alone SERVER LOOP PORT [OPTION=VALUE …]`.

Instructions are counted of it: the simulator that counts them does not know all of the system calls of an anchor.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import ecdysis_async
from ecdysis_async import Ecdysis

from .hello import app, make_aiohttp
from .pairs import HOST


async def serve(server: str, port: int, options: dict[str, str]) -> None:
    """Serve to the end, without an access log, and without a look at proxy headers."""
    async with Ecdysis() as ecdysis:
        if server == "uvicorn":
            import uvicorn

            import ecdysis_async.servers.uvicorn

            quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "proxy_headers": False}
            config = uvicorn.Config(app, host=HOST, port=port, **quiet, **options)  # type: ignore[arg-type]
            await ecdysis_async.servers.uvicorn.serve(ecdysis, config)
        elif server == "aiohttp":
            import ecdysis_async.servers.aiohttp

            await ecdysis_async.servers.aiohttp.serve(ecdysis, make_aiohttp(), host=HOST, port=port, access_log=None)
        else:
            import hypercorn.config

            import ecdysis_async.servers.hypercorn

            settings = hypercorn.config.Config()
            settings.bind = [f"{HOST}:{port}"]
            await ecdysis_async.servers.hypercorn.serve(ecdysis, app, settings)


def main(server: str, loop: Any, port: str, *options: str) -> None:
    """Serve on a loop, with options of the server."""
    given = dict(each.split("=", 1) for each in options)
    ecdysis_async.run(functools.partial(serve, server, int(port), given), loop=loop)


if __name__ == "__main__":
    main(*sys.argv[1:])
