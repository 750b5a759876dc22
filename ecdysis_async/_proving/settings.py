"""How the command and the service that it proves find each other: names of headers and variables, nothing else."""

from __future__ import annotations

__all__ = [
    "APP_DIR_VARIABLE",
    "BROKEN_VARIABLE",
    "FACTORY_VARIABLE",
    "GENERATION_HEADER",
    "PID_HEADER",
    "PLAIN_VARIABLE",
    "REQUEST_HEADER",
    "TARGET_VARIABLE",
]

# A request says its number, and the answer repeats it.
REQUEST_HEADER = "x-ecdysis-request"
PID_HEADER = "x-ecdysis-pid"
GENERATION_HEADER = "x-ecdysis-generation"

TARGET_VARIABLE = "ECDYSIS_PROVE_TARGET"
APP_DIR_VARIABLE = "ECDYSIS_PROVE_APP_DIR"
FACTORY_VARIABLE = "ECDYSIS_PROVE_FACTORY"
# Serve the target as it is: it is a handler that no header can be added to.
PLAIN_VARIABLE = "ECDYSIS_PROVE_PLAIN"
# A path: while there is a file, a release does not start.
BROKEN_VARIABLE = "ECDYSIS_PROVE_BROKEN"
