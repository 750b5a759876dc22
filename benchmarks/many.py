"""A service with as many listening sockets as it is told, for ``ecdysis run benchmarks.many:main``."""

from __future__ import annotations

import os

from ecdysis_async import Ecdysis


async def main(ecdysis: Ecdysis) -> None:
    """Listen below the directory ``SOCKETS_IN``, ``SOCKETS`` times."""
    for number in range(int(os.environ["SOCKETS"])):
        ecdysis.listen_unix(os.path.join(os.environ["SOCKETS_IN"], str(number)))
    await ecdysis.serve_forever()
