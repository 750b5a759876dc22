"""One proof: the service is started, loaded, restarted and hit as the plan says, and judged."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import time
from collections.abc import Callable

from .load import Load
from .plan import Plan
from .processes import measure_memory
from .records import History, Memory, Process, Restart
from .rules import name_restart
from .service import Service, ServiceFailed, choose_service
from .verdict import Verdict, judge

__all__ = ["prove"]

# How often the service is looked at, seconds.
LOOK_SECONDS = 0.1

# Reading the memory of a process takes the kernel milliseconds: every so many looks.
MEMORY_LOOKS = 3

Tell = Callable[[str], None]


def prove(plan: Plan, tell: Tell = lambda line: None) -> Verdict:
    """Carry a plan out, on a loop of its own.

    Args:
        plan: what to do.
        tell: called with a line about each thing that is done.

    Raises:
        PlanError: something in the plan cannot be.
        ServiceFailed: there is no service to be proved.
    """
    factory = None
    if importlib.util.find_spec("uvloop") is not None:
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(_prove(plan, tell))


async def _prove(plan: Plan, tell: Tell) -> Verdict:
    history = History(patience=plan.patience)
    with choose_service(plan) as service:
        try:
            await service.start()
            await _load(plan, service, history, tell)
        finally:
            await service.stop()
    return judge(history, plan.max_slowdown)


async def _load(plan: Plan, service: Service, history: History, tell: Tell) -> None:
    identify_by = plan.identify_by
    load = Load(service.url, plan.requests, history, patience=plan.patience, identify_by=identify_by)
    tell(f"proving {service.url}")
    await load.try_out()
    history.began_at = time.time() - load.clock()
    generations = [generation for generation, _ in (await service.look()).values() if generation is not None]
    history.generation = max(generations, default=None)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(load.run())
        watching = tasks.create_task(_watch(service, history, load.clock))
        try:
            await asyncio.sleep(plan.between)
            for number, step in enumerate(plan.steps, 1):
                restart = Restart(step, load.clock())
                history.restarts.append(restart)
                tell(f"{load.clock():6.1f} s  {name_restart(number, restart)}")
                try:
                    await service.carry_out(restart, load.clock)
                except ServiceFailed as error:  # it is gone: what that has cost is the verdict
                    restart.message, restart.answered = str(error), load.clock()
                    break
                await asyncio.sleep(plan.between)
        finally:
            load.end()
            await asyncio.wait((running,))
            watching.cancel()
    if not any(each.answer and each.answer.generation is not None for each in history.exchanges):
        history.notes.append("no answer names its generation: whether that was serving is not checked")


async def _watch(service: Service, history: History, clock: Callable[[], float]) -> None:
    """Take note of the processes that there are, and of the memory that they use."""
    processes: dict[int, Process] = {}
    looks = 0
    while True:
        with contextlib.suppress(ServiceFailed):  # nobody answers in the moment of a kill: look again
            found = await service.look()
            now = clock()
            for pid, (generation, state) in found.items():
                if pid not in processes:
                    processes[pid] = Process(pid, generation, now)
                    history.processes.append(processes[pid])
                states = processes[pid].states
                if state is not None and (not states or states[-1][1] != state):
                    states.append((now, state))
            for pid in processes.keys() - found.keys():
                processes[pid].gone = processes[pid].gone or now
            if looks % MEMORY_LOOKS == 0:
                family = await service.find_processes()
                if used := await asyncio.to_thread(measure_memory, family):
                    history.memory.append(Memory(clock(), used))
        looks += 1
        await asyncio.sleep(LOOK_SECONDS)
