"""What every test stands on: the backends it runs on, and the guard that nothing outlives it.

An ``async def`` test runs three times: on asyncio and on uvloop by pytest-asyncio, and on trio. A plain test that asks
for ``backend`` runs three times as well, with the name of the loop its child processes shall use. The marker
``backends`` chooses fewer. The marker ``main_python_only`` leaves what knows nothing of the differences of Pythons to
the main one. Async fixtures (``pytest_asyncio.fixture``) work on asyncio and uvloop only.
"""

from __future__ import annotations

import asyncio
import compileall
import contextlib
import functools
import gc
import inspect
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil
import pytest
import trio
import uvloop
from _pytest.assertion import rewrite

from ecdysis_async._system import own_log, wording

LOOP_FACTORIES: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}
BACKENDS = (*LOOP_FACTORIES, "trio")
# The one that runs all tests: the newest beside which Debian has the programs that some tests need.
MAIN_PYTHON = (3, 13)
CURRENT_BACKEND = pytest.StashKey[str]()

# Marks the processes that a test starts, so that they are found also where their parent, a generation that left, has
# died before them.
GUARD_VARIABLE = "TEST_GUARD"

# How long a process that is no child of ours, and so cannot be waited on by the test, may take over its exit.
ORPHAN_GRACE_SECONDS = 30.0


def pytest_configure(config: pytest.Config) -> None:
    """Compile the project once, and not in each of the thousands of processes that the tests start.

    They do so, each for itself, where PYTHONDONTWRITEBYTECODE is set: half of what an ``ecdysis restart`` takes.
    """
    if not hasattr(config, "workerinput"):  # one process does it, before xdist has others
        for name in ("ecdysis_async", "benchmarks", "examples", "tests"):
            compileall.compile_dir(config.rootpath / name, quiet=2)
    else:
        rewrite_share(config)


def rewrite_share(config: pytest.Config) -> None:
    """Prepare this worker's share of the test modules for all workers: each would prepare all of them for itself.

    It is half of their collection, and pytest keeps it where it may write bytecode only.
    """
    worker: dict[str, Any] = config.workerinput  # type: ignore[attr-defined] # xdist's
    paths = sorted((config.rootpath / "tests").rglob("test_*.py"))
    for path in paths[int(worker["workerid"].removeprefix("gw")) :: worker["workercount"]]:
        cache = rewrite.get_cache_dir(path)
        pyc = cache / f"{path.stem}{rewrite.PYC_TAIL}"
        if rewrite._read_pyc(path, pyc) is None and rewrite.try_makedirs(cache):
            source_hash, code = rewrite._rewrite_test(path, config)
            rewrite._write_pyc(config.stash[rewrite.assertstate_key], code, source_hash, pyc)


def pytest_sessionstart() -> None:
    """Let nothing depend on who started the tests, and let libuv open what it opens once and never closes."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell without job control starts what runs in the background with Ctrl-C ignored, and so would be each
        # process of each test (POSIX, shell command language, 2.11).
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # The pipe that serialises its signal handlers.
    uvloop.new_event_loop().close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, on another Python, what the main one has tested for all."""
    if sys.version_info[:2] != MAIN_PYTHON:
        left_out = {item: is_for_main_python(item) for item in items}
        config.hook.pytest_deselected(items=[item for item in items if left_out[item]])
        items[:] = [item for item in items if not left_out[item]]


def is_for_main_python(item: pytest.Item) -> bool:
    """Say whether a test, with these parameters, runs on the main Python only."""
    marker = item.get_closest_marker("main_python_only")
    if marker is None:
        return False
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return parameters.get("backend", parameters.get("loop")) not in marker.kwargs.get("but", ())


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """Name the backend of this test: "asyncio", "uvloop" or "trio"."""
    name: str = request.param
    request.config.stash[CURRENT_BACKEND] = name
    return name


def pytest_pycollect_makeitem(collector: pytest.Module | pytest.Class, name: str, obj: object) -> None:
    """Give each async test the fixture ``backend``, asked for or not."""
    if inspect.iscoroutinefunction(obj) and collector.istestfunction(obj, name):
        pytest.mark.usefixtures("backend")(obj)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Let a test run on its backends; the ones of asyncio become tests of pytest-asyncio."""
    if "backend" not in metafunc.fixturenames:
        return
    chosen = metafunc.definition.get_closest_marker("backends")
    names = BACKENDS if chosen is None else chosen.args
    if inspect.iscoroutinefunction(metafunc.function):
        # pytest-asyncio asks for its loop factories where the definition is marked, and makes its own kind of test of
        # each one that is marked: the marks of a parameter reach the latter only.
        metafunc.definition.add_marker(pytest.mark.asyncio)
        parameters = [pytest.param(name, marks=pytest.mark.asyncio if name != "trio" else ()) for name in names]
    else:
        parameters = [pytest.param(name) for name in names]
    metafunc.parametrize("backend", parameters, ids=names, indirect=True)


def pytest_asyncio_loop_factories(config: pytest.Config) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Make the loop that the fixture ``backend`` names; it is set up before any loop."""

    def new_loop() -> asyncio.AbstractEventLoop:
        loop = LOOP_FACTORIES[config.stash[CURRENT_BACKEND]]()
        loop.set_exception_handler(end_at_timeout)
        return loop

    return {"backend": new_loop}


def end_at_timeout(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """End a test whose time is up also on uvloop, which runs signal handlers in a callback and logs what they raise."""
    loop.default_exception_handler(context)
    if isinstance(context.get("exception"), pytest.fail.Exception):
        for task in asyncio.all_tasks(loop):
            task.cancel("the test's time is up")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keep asyncio's loop out of the tests that run on trio."""
    # The tests of one function share a list of fixtures, and pytest-asyncio appends its runner to it in each setup.
    if isinstance(item, pytest.Function):
        item.fixturenames = list(item.fixturenames)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object | None:
    """Run an async test on trio."""
    if pyfuncitem.funcargs.get("backend") != "trio" or not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    trio.run(functools.partial(pyfuncitem.obj, **arguments))
    return True


@pytest.fixture(autouse=True)
def nobody_speaks_from_a_test_before() -> Iterator[None]:
    """Let the lines of a test name no process or restart of the test before, and settings by their own names."""
    yield
    own_log.let_speak(None)
    vars(wording)["_is_by_command"] = False


@pytest.fixture(autouse=True)
def nothing_outlives_the_test() -> Iterator[None]:
    """Fail a test that leaves descriptors, processes or zombies behind, and end those processes."""
    mark = str(uuid.uuid4())
    os.environ[GUARD_VARIABLE] = mark
    descriptors = open_descriptors()
    children = find_children()
    yield
    del os.environ[GUARD_VARIABLE]
    descriptors = open_descriptors() - descriptors
    if descriptors:
        # What only a cycle of garbage keeps open is closed now; where that is a defect, its ResourceWarning says so.
        gc.collect()
        descriptors &= open_descriptors()
    leaks = [f"descriptor {number}: {target}" for number, target in sorted(descriptors)]
    processes = find_children() - children
    if marked := find_marked(mark):
        psutil.wait_procs(marked - processes, timeout=ORPHAN_GRACE_SECONDS)
        processes |= find_marked(mark)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself meanwhile, and its parent reaped it
            leaks.append(describe_process(process))
            process.kill()
    psutil.wait_procs(processes, timeout=ORPHAN_GRACE_SECONDS)
    if leaks:
        pytest.fail("the test left behind:\n  " + "\n  ".join(leaks), pytrace=False)


def open_descriptors() -> set[tuple[int, str]]:
    """List the descriptors of this process, each with what it refers to."""
    descriptors = set()
    for number in os.listdir("/proc/self/fd"):
        # The descriptor that listdir itself had open is gone again.
        with contextlib.suppress(FileNotFoundError):
            descriptors.add((int(number), os.readlink(f"/proc/self/fd/{number}")))
    return descriptors


def find_children() -> set[psutil.Process]:
    """Find the children of this process, zombies too, and their children."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # there is none, and no need to ask each process of the machine who its parent is
        return set()
    return set(psutil.Process().children(recursive=True))


def find_marked(mark: str) -> set[psutil.Process]:
    """Find the running processes that were started with a guard's mark in their environment."""
    marked = set()
    # psutil would take four times as long, after each of thousands of tests.
    for name in filter(str.isdecimal, os.listdir("/proc")):
        # Another user's process, or one that ended meanwhile, is none that this test left running.
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            if f"{GUARD_VARIABLE}={mark}".encode() in read_environment(name).split(b"\0"):
                marked.add(psutil.Process(int(name)))
    return marked


def read_environment(pid: str) -> bytes:
    """Return the environment with which a process was started.

    While the kernel executes a program, it is empty: for some time after ``subprocess.Popen`` has returned.
    """
    while True:
        with open(f"/proc/{pid}/environ", "rb") as file:
            environment = file.read()
        if environment or not is_in_exec(pid):
            return environment


def is_in_exec(pid: str) -> bool:
    """Say whether a process has memory, and the kernel has put no environment there yet; proc_pid_stat(5)."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()  # from the third on: the second, a name, may hold anything
    vsize, env_end = fields[20], fields[48]
    return vsize != b"0" and env_end == b"0"


def describe_process(process: psutil.Process) -> str:
    """Say what a reader of a failed test needs to find the culprit."""
    facts = process.as_dict(["status", "cmdline"])
    return f"process {process.pid}, {facts['status']}: {' '.join(facts['cmdline'] or ['?'])}"
