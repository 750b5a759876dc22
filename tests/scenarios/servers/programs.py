"""Programs of the distribution that stand before a service, or use it: found, run, and ended with all they started."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

# What they may take to end when they are asked to, before they are killed, seconds.
END_SECONDS = 5.0


def find(name: str) -> str:
    """Return the path of a program.

    Where there is none, the test is skipped; but where the tests are to vouch for the project, there has to be one.
    """
    # Servers are in places that only root's PATH has.
    path = shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin")))
    if path is not None:
        return path
    message = f"{name} is not installed: apt-get install {name}"
    if os.environ.get("CI") == "true":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def browser(directory: Path, url: str, *arguments: str) -> list[str]:
    """Return the command of a browser that opens a page, and can ask nobody but this machine for anything.

    Args:
        directory: for its files, which are in ``browser`` below it.
        url: of the page.
        arguments: further ones.
    """
    return [
        find("chromium"),
        "--headless",
        "--no-sandbox",  # root's browser has none
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-breakpad",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={directory / 'browser'}",
        *arguments,
        url,
    ]


def browse(file: Path, directory: Path, *arguments: str) -> str:
    """Open a page that is a file in a browser; return what the browser prints, which has nothing to complain of."""
    command = browser(directory, file.as_uri(), "--enable-logging=stderr", "--virtual-time-budget=5000", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, stdin=subprocess.DEVNULL)
    # What the page's console says.
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


@contextlib.contextmanager
def running(command: Sequence[str], directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program that writes what it has to say to a file of that directory; at the end nothing is left of it."""
    log = directory / f"{Path(command[0]).name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=directory, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield process
    except BaseException:
        print(log.read_text(errors="replace"))  # noqa: T201 - pytest shows it with a failure
        raise
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.kill()
        process.wait()
