"""What uWSGI serves, by whatever Python it was built for; it keeps no connection, and says so."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RELEASE = Path(os.environ["RELEASE_FILE"]).read_text()
if RELEASE == "broken":
    raise SystemExit("a release that does not start")
time.sleep(float(os.environ["IMPORT_SECONDS"]))


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer as ``benchmarks.asgi`` does."""
    *command, text = environ["PATH_INFO"].strip("/").split("/")
    if command[0] == "slow":
        time.sleep(float(command[1]))
    body = f"{RELEASE} {text}".encode()
    start_response("200 OK", [("Content-Length", str(len(body))), ("Connection", "close")])
    return [body]
