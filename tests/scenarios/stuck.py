"""An application that lets no process of it end, restarted again and again under load: is anything left behind?

It is for services of either kind. How many restarts there are, the variable ECDYSIS_TEST_RESTARTS says: a few for each
run of the tests, and more for whoever wants to see a line that is flat over hundreds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import psutil

from tests.scenarios.handoff.harness import Clients, Service

__all__ = ["LIMITS", "STUCK", "restart_under_load"]

RESTARTS = int(os.environ.get("ECDYSIS_TEST_RESTARTS", "6"))

LIMITS = {"probation": 0.05, "drain_timeout": 1, "exit_timeout": 0.5}

# Run in each generation: a thread that is no daemon, and a child process that is alive.
STUCK = """
import multiprocessing, threading, time, warnings
warnings.simplefilter("ignore")
threading.Thread(target=time.sleep, args=(6000,), name="poller").start()
multiprocessing.get_context("fork").Process(target=time.sleep, args=(6000,), name="helper").start()
None
"""

CLIENTS = 3

# What a process may have more of than the same kind of process had after the first restarts.
MORE_DESCRIPTORS = 4
MORE_BYTES = 3 * 1024 * 1024


def restart_under_load(service: Service, restart: Callable[[], object], lasting: Callable[[], int]) -> None:
    """Restart a service many times; see that nobody is refused or lost, and that nothing becomes more.

    Args:
        service: runs STUCK in each generation, with LIMITS.
        restart: restarts it, and returns once the restart has settled.
        lasting: returns the pid of the process that stands for the service: what it has is counted.
    """
    counts: list[tuple[int, int, int]] = []
    processes = len(find_processes(service))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Clients(service.address)) for _ in range(CLIENTS)]
        for number in range(RESTARTS):
            restart()
            service.wait_until(
                lambda: len(find_processes(service)) <= processes,
                f"there are more than {processes} processes: {find_processes(service)}",
            )
            process = psutil.Process(lasting())
            counts.append((len(find_processes(service)), process.num_fds(), process.memory_info().rss))
            if number % 20 == 0 or number == RESTARTS - 1:
                print(f"after {number + 1} restarts: processes, descriptors, bytes {counts[-1]}", flush=True)  # noqa: T201
    answers = sum(len(each.answers) for each in clients)
    print(f"{answers} answers, {RESTARTS} restarts")  # noqa: T201
    assert [failure for each in clients for failure in (*each.refused, *each.lost)] == []
    first, last = counts[1], counts[-1]
    # Clients come and go, and a former generation that has just ended is let go of a moment later.
    process = psutil.Process(lasting())
    service.wait_until(
        lambda: process.num_fds() <= first[1] + MORE_DESCRIPTORS,
        f"it has {process.num_fds()} descriptors, and had {first[1]}",
    )
    assert last[2] <= first[2] + MORE_BYTES


def find_processes(service: Service) -> list[int]:
    """Return the processes of a service, also those that its application has started and nobody has waited for."""
    found = []
    for each in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if each.status() != psutil.STATUS_ZOMBIE and str(service.directory) in " ".join(each.cmdline()):
                found.append(each.pid)
    return found
