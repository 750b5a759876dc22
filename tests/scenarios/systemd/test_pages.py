"""The unit and the deploy script that docs/moving-here.md shows, as shown, on a real systemd."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from tests.scenarios.run.commands import wait_until
from tests.scenarios.systemd.machine import PROJECT, Machine
from tests.scenarios.systemd.test_unit import PACKAGES

pytestmark = pytest.mark.main_python_only

SNIPPETS = PROJECT / "docs" / "snippets"
RELEASES = "/srv/shop/releases"

APP = """
async def app(scope, receive, send):
    assert scope["type"] == "http"
    await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]}})
    await send({{"type": "http.response.body", "body": b"{release}"}})
"""

# What `pip install` would write into the virtual environment of a release.
ECDYSIS = """#!/bin/sh
PYTHONPATH=/srv/ecdysis/packages exec /usr/bin/python3 -m ecdysis_async.cli "$@"
"""

ASK = """
import http.client, socket
connection = http.client.HTTPConnection("localhost")
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect("/run/shop/web.sock")
connection.request("GET", "/")
print(connection.getresponse().read().decode())
"""


def write(machine: Machine, path: str, text: str) -> None:
    """Write a file where only the machine has it."""
    draft = machine.directory / "draft"
    draft.write_text(text)
    machine.run("install", "-D", "--mode=0755", str(draft), path)


def ask(machine: Machine) -> str:
    """Ask as the proxy would; return the release that answers."""
    become = ("setpriv", "--reuid=nobody", "--regid=www-data", "--clear-groups")
    return machine.run(*become, "/usr/bin/python3", "-c", ASK).strip()


def test_a_release_is_deployed_by_the_script_and_a_broken_one_is_taken_back(machine: Machine) -> None:
    packages = Path(sysconfig.get_path("purelib"))
    machine.run("mkdir", "-p", "/srv/ecdysis/packages")
    for path in (PROJECT / "ecdysis_async", *(packages / name for name in (*PACKAGES, "uvicorn", "h11"))):
        machine.run("cp", "-r", str(path), "/srv/ecdysis/packages")
    machine.run("chmod", "-R", "a+rX", "/srv/ecdysis")
    releases = {"1": APP.format(release=1), "2": APP.format(release=2), "3": "import nothing_there\n"}
    for name, text in releases.items():
        write(machine, f"{RELEASES}/{name}/main.py", text)
        write(machine, f"{RELEASES}/{name}/.venv/bin/ecdysis", ECDYSIS)
    machine.run("ln", "-s", f"{RELEASES}/1", "/srv/shop/current")
    # The environment of a release is there already.
    script = [line for line in (SNIPPETS / "deploy.sh").read_text().splitlines() if ".venv" not in line]
    write(machine, "/srv/shop/deploy.sh", "\n".join(script))
    machine.install("shop.service", (SNIPPETS / "shop.service").read_text().replace("User=shop", "User=daemon"))

    machine.systemctl("start", "shop.service")
    assert ask(machine) == "1"
    machine.run("sh", "/srv/shop/deploy.sh", "2")
    assert ask(machine) == "2"
    assert machine.fails("sh", "/srv/shop/deploy.sh", "3")
    assert ask(machine) == "2"
    assert machine.run("readlink", "/srv/shop/current").strip() == f"{RELEASES}/2"
    wait_until(lambda: "nothing_there" in machine.show("shop.service", "StatusText"), "systemd is not told why")
    # The commands find it by themselves.
    assert "generation 2" in machine.run("/srv/shop/current/.venv/bin/ecdysis", "status")
    machine.systemctl("stop", "shop.service")
    assert machine.show("shop.service", "Result") == "success"
