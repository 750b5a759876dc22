"""Conformance through restarts: what programs of others say of a service that restarts, and of one that does not.

``python -m tests.conformance.conformance`` prints tables, and ``nox -s conformance`` does the same. It needs h2load and
varnishtest (Debian's nghttp2-client and varnish), and kosoku, which has Autobahn's cases of WebSockets.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from tests.conformance.service import Service, serving
from tests.scenarios.servers.test_http2 import Client as HTTP2Client

__all__: list[str] = []

GOODBYES = Path(__file__).parent / "goodbyes"
OPTIONS = ("--probation", "0.2", "--drain-timeout", "20", "--no-access-log")

# How long a service serves between two restarts, seconds.
PAUSE_SECONDS = 1.0

# How long the clients of HTTP/2 ask, seconds.
HTTP2_SECONDS = 20

# A WebSocket that a restart has closed says so (RFC 6455, 7.4.1, and IANA's registry): its case is tried again.
SERVICE_RESTART = 1012
ATTEMPTS = 10

# Cases that take minutes: messages of many megabytes, and a thousand messages that are compressed.
LONG_CASES = ("9.*", "12.*", "13.*")


@contextlib.asynccontextmanager
async def restarting(service: Service, *, is_wanted: bool) -> AsyncIterator[None]:
    """Restart a service every second meanwhile, if that is wanted."""
    if not is_wanted:
        yield
        return
    restarts = asyncio.create_task(service.restart_every(PAUSE_SECONDS))
    try:
        yield
    finally:
        restarts.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await restarts


async def run(*command: str) -> str:
    """Run a program; return what it has said on both outputs."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    return output.decode(errors="replace")


async def try_websockets(*, is_restarted: bool) -> tuple[dict[str, str], int, int]:
    """Try Autobahn's cases; return what each has come to, how many were tried again, and how many restarts there were.

    A case that met the goodbye of a restart is tried again, as a client comes back: the goodbye is right, and no news.
    """
    results: dict[str, str] = {}
    repeated = 0
    async with serving("echo_app:app", *OPTIONS) as service, restarting(service, is_wanted=is_restarted):
        cases: Sequence[str] = ()
        for _ in range(ATTEMPTS):
            found = await run_kosoku(service.port, cases)
            results |= {case: each["behavior"] for case, each in found.items()}
            cases = [case for case, each in found.items() if each["remoteCloseCode"] == SERVICE_RESTART]
            repeated += len(cases)
            if not cases:
                break
    return results, repeated, len(service.reports)


async def run_kosoku(port: int, cases: Sequence[str]) -> dict[str, Any]:
    """Run some of Autobahn's cases, or all but the long ones; return what is reported of each."""
    chosen = [word for case in cases for word in ("-i", case)]
    left_out = [word for case in LONG_CASES for word in ("-x", case)]
    with tempfile.TemporaryDirectory(prefix="ecdysis-") as directory:
        said = await run("kosoku", *(chosen or left_out), "-o", directory, f"ws://127.0.0.1:{port}/")
        index = Path(directory, "index.json")
        if not index.exists():
            raise RuntimeError(f"kosoku has not reported: {said}")
        (found,) = json.loads(index.read_text(encoding="utf-8")).values()
    return dict(found)


async def compare_websockets() -> bool:
    """Print what became of Autobahn's cases; say whether restarts change nothing."""
    tell("| Autobahn's cases by kosoku | cases | OK | non-strict | informational | failed | restarts | tried again |")
    tell("|---|--:|--:|--:|--:|--:|--:|--:|")
    found = []
    for is_restarted in (False, True):
        results, repeated, restarts = await try_websockets(is_restarted=is_restarted)
        found.append(results)
        count = collections.Counter(results.values())
        names = [count[name] for name in ("OK", "NON-STRICT", "INFORMATIONAL", "FAILED")]
        figures = " | ".join(map(str, (len(results), *names, restarts, repeated)))
        tell(f"| {'with' if is_restarted else 'without'} restarts | {figures} |")
    before, after = found
    differences = [case for case in before if before[case] != after.get(case)]
    failed = [case for case, each in before.items() if each == "FAILED"]
    tell(f"\nFailed without restarts: {', '.join(failed) or 'none'}.")
    tell(f"Other results with them: {', '.join(differences) or 'none'}.\n")
    return not differences


async def compare_http2() -> bool:
    """Print what clients of HTTP/2 have seen; say whether all that was sent was answered."""
    tell("| HTTP/2 on hypercorn | restarts | answered | not sent after a GOAWAY | failed |")
    tell("|---|--:|--:|--:|--:|")
    is_sound = True
    for is_restarted in (False, True):
        for name, ask in (("h2load", load), ("a client that counts", count)):
            async with (
                serving("echo_app:app", "--server", "hypercorn", *OPTIONS) as service,
                restarting(service, is_wanted=is_restarted),
            ):
                answered, unsent, failed = await ask(service.port)
            is_sound &= answered > 0 and not failed
            figures = f"{len(service.reports)} | {answered:,} | {unsent} | {failed}"
            tell(f"| {name}, {'with' if is_restarted else 'without'} restarts | {figures} |")
    tell("")
    return is_sound


async def load(port: int) -> tuple[int, int, int]:
    """Let h2load ask; return what was answered, what it did not send, and what failed.

    It goes on asking on a connection that has had a GOAWAY: its library sends no such request, which it counts as
    failed. A GOAWAY comes of hypercorn without restarts as well, after a thousand requests on a connection.
    """
    said = await run("h2load", "-D", str(HTTP2_SECONDS), "-c", "4", "-m", "4", f"http://127.0.0.1:{port}/")
    totals = re.search(r"(\d+) succeeded, (\d+) failed, \d+ errored, (\d+) timeout", said)
    codes = re.search(r"status codes: \d+ 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx", said)
    if totals is None or codes is None:
        raise RuntimeError(f"h2load has not reported: {said}")
    succeeded, unsent, late = map(int, totals.groups())
    return succeeded, unsent, late + sum(map(int, codes.groups()))


async def count(port: int) -> tuple[int, int, int]:
    """Ask by a client that counts each request, and takes another connection at a GOAWAY; return the same."""
    answers: collections.Counter[str] = collections.Counter()
    failures: collections.Counter[str] = collections.Counter()
    over = asyncio.Event()
    async with asyncio.TaskGroup() as clients:
        for _ in range(8):
            clients.create_task(HTTP2Client(port, answers, failures).run(over))
        await asyncio.sleep(HTTP2_SECONDS)
        over.set()
    for failure, times in failures.items():
        sys.stderr.write(f"{times} times {failure}\n")
    return answers.total(), 0, failures.total()


async def compare_goodbyes() -> bool:
    """Print what varnishtest's scripts have come to; say whether all have passed."""
    tell("| goodbyes by varnishtest | server | |")
    tell("|---|---|---|")
    is_sound = True
    for script, server, options in (
        ("http1", "uvicorn", ["--no-transfer"]),
        ("http1", "hypercorn", []),
        ("http2", "hypercorn", []),
        ("moved", "uvicorn", []),
    ):
        path = GOODBYES / f"{script}.vtc"
        async with serving("echo_app:app", "--server", server, *options, *OPTIONS) as service:
            restart = f"{sys.executable} -m ecdysis_async restart --control {service.control}"
            said = await run("varnishtest", "-D", f"port={service.port}", "-D", f"restart={restart}", str(path))
        has_passed = " passed" in said
        is_sound &= has_passed
        title = path.read_text(encoding="utf-8").partition('"')[2].partition('"')[0]
        tell(f"| {title} | {server} | {'passed' if has_passed else '**failed**'} |")
        if not has_passed:
            sys.stderr.write(said)
    tell("")
    return is_sound


def tell(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


COMPARISONS: dict[str, tuple[str, Callable[[], Coroutine[Any, Any, bool]]]] = {
    "websockets": ("kosoku", compare_websockets),
    "http2": ("h2load", compare_http2),
    "goodbyes": ("varnishtest", compare_goodbyes),
}


async def main() -> int:
    """Print the tables; return 0 where restarts change nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMPARISONS)} [default: all]")
    is_sound = True
    for name in parser.parse_args().names or COMPARISONS:
        program, compare = COMPARISONS[name]
        if shutil.which(program) is None:
            tell(f"{name}: {program} is not installed\n")
            is_sound = False
        else:
            is_sound &= await compare()
    return int(not is_sound)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
