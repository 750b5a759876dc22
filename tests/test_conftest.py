"""The guard and the backends of conftest.py fail what they ought to fail: shown on a pytest run of its own."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.main_python_only

HERE = Path(__file__).parent

SUITE = '''
"""Tests of which all but the first two leave something behind, or are wrong."""

import asyncio
import os
import subprocess
import sys

import anyio
import pytest
import pytest_asyncio

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
ORPHAN = f"import subprocess; print(subprocess.Popen({SLEEP}, stdout=-3, stderr=-3).pid)  # -3 is DEVNULL"
kept = []


def test_clean():
    for descriptor in os.pipe():
        os.close(descriptor)
    subprocess.run([sys.executable, "-c", "pass"], check=True)


async def test_clean_async(backend):
    await anyio.run_process([sys.executable, "-c", "pass"])


def test_descriptor():
    os.open(os.devnull, os.O_RDONLY)


def test_running_child():
    kept.append(subprocess.Popen(SLEEP))
    print("KILLED", kept[-1].pid)


def test_zombie():
    kept.append(subprocess.Popen([sys.executable, "-c", "pass"]))
    os.waitid(os.P_PID, kept[-1].pid, os.WEXITED | os.WNOWAIT)


def test_orphan():
    print("KILLED", subprocess.run([sys.executable, "-c", ORPHAN], check=True, text=True, capture_output=True).stdout)


async def test_descriptor_async(backend):
    await anyio.lowlevel.checkpoint()
    os.open(os.devnull, os.O_RDONLY)


async def test_failure_async():
    await anyio.lowlevel.checkpoint()
    assert False, "seen to fail"


@pytest_asyncio.fixture
async def loop():
    return asyncio.get_running_loop()


@pytest.mark.backends("trio")
async def test_async_fixture_on_trio(loop):
    pass
'''


def test_what_must_fail_fails(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makepyprojecttoml((HERE.parent / "pyproject.toml").read_text())
    pytester.makeconftest(
        (HERE / "conftest.py").read_text().replace("ORPHAN_GRACE_SECONDS = 30.0", "ORPHAN_GRACE_SECONDS = 0.05")
    )
    pytester.makepyfile(SUITE)

    result = pytester.runpytest_subprocess("-rA", "-p", "no:cacheprovider", ".", timeout=240)

    result.assert_outcomes(passed=11, failed=3, errors=8)
    output = result.stdout.str()
    assert {line.split("::")[1].split(" ")[0] for line in result.outlines if line.startswith("ERROR ")} == {
        "test_descriptor",
        "test_running_child",
        "test_zombie",
        "test_orphan",
        "test_descriptor_async[asyncio]",
        "test_descriptor_async[uvloop]",
        "test_descriptor_async[trio]",
        "test_async_fixture_on_trio[trio]",
    }
    assert output.count("AssertionError: seen to fail") >= len(("asyncio", "uvloop", "trio"))
    pids = {int(line.split()[1]) for line in result.outlines if line.startswith("KILLED")}
    assert len(pids) == 2
    assert not [pid for pid in pids if is_running(pid)]


def is_running(pid: int) -> bool:
    # What is killed may stay a zombie where nobody reaps orphans.
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
