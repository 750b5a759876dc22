"""Make a service fail at every point, in every way, and print what came of it: ``python -m tests.faults``.

``nox -s faults`` does the same. Points are found in the source (points.py); who reaches them is found out by doing
each operation once with nothing failing. The exit status is 1 where anything was lost, or untrue.
"""

from __future__ import annotations

import argparse
import os
import queue
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from tests.faults.cells import OPERATIONS, Cell, Seen, record, run, serving
from tests.faults.points import faults_of, find_calls, find_messages

Results = list[tuple[Cell, Seen]]


def write(line: str) -> None:
    """Print a line at once, so that it is there whatever becomes of the rest."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def work(cells: queue.SimpleQueue[list[Cell]], results: Results, lock: threading.Lock) -> None:
    """Take the cells of one operation after the other, on as few services as are needed."""
    while True:
        try:
            batch = cells.get_nowait()
        except queue.Empty:
            return
        while batch:
            with serving(batch[0].operation) as service:
                while batch:
                    cell = batch.pop(0)
                    try:
                        seen = run(service, cell)
                    except AssertionError as error:
                        seen = Seen(is_reached=True, wrong=[str(error).splitlines()[0]])
                        sys.stderr.write(f"{cell}: {error}\n\n")
                    with lock:
                        results.append((cell, seen))
                        write(describe(cell, seen))
                    if not seen.serves:
                        break
                else:
                    service.stop()


def describe(cell: Cell, seen: Seen) -> str:
    """Return a row of the table."""
    expected = "serves" if seen.must_serve else "nobody left"
    found = ("serves" if seen.serves else "ended") if seen.is_reached else "not reached this time"
    verdict = "; ".join(seen.wrong) or "as expected"
    columns = (cell.operation, cell.role, cell.point, cell.fault, expected, f"{found}: {seen.outcome}")
    return f"| {' | '.join(columns)} | {seen.lost} | {seen.lost_with_dead} | {verdict} |"


def summarise(results: Results) -> list[str]:
    """Return a table of how often what was seen."""
    lines = ["| operation | who fails | points | faults | reached | lost | lost with the killed | wrong |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for operation, role in dict.fromkeys((cell.operation, cell.role) for cell, _ in sorted(results, key=str)):
        mine = [(cell, seen) for cell, seen in results if (cell.operation, cell.role) == (operation, role)]
        numbers = (
            len({cell.point for cell, _ in mine}),
            len(mine),
            sum(seen.is_reached for _, seen in mine),
            sum(seen.lost for _, seen in mine),
            sum(seen.lost_with_dead for _, seen in mine),
            sum(bool(seen.wrong) for _, seen in mine),
        )
        lines.append(f"| {operation} | {role} | {' | '.join(map(str, numbers))} |")
    faults = Counter(cell.fault for cell, seen in results if seen.is_reached)
    lines.append("")
    lines.append(", ".join(f"{number} x {fault}" for fault, number in faults.most_common()))
    return lines


def main() -> int:
    """Do it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operations", nargs="*", default=list(OPERATIONS), help=f"of {', '.join(OPERATIONS)}")
    parser.add_argument("--fault", action="append", help="these faults only")
    parser.add_argument("--role", action="append", help="these roles only")
    parser.add_argument("--point", default="", help="points with this text only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many services at a time")
    arguments = parser.parse_args()
    begun = time.monotonic()
    reached = {operation: record(operation) for operation in arguments.operations}
    known = {*find_messages(), *find_calls()}
    found = {point for points in reached.values() for _, point in points}
    cells: queue.SimpleQueue[list[Cell]] = queue.SimpleQueue()
    for operation, points in reached.items():
        for fault in dict.fromkeys(fault for _, point in points for fault in faults_of(point)):
            batch = [
                Cell(operation, role, point, fault)
                for role, point in points
                if fault in faults_of(point)
                and (arguments.fault is None or fault in arguments.fault)
                and (arguments.role is None or role in arguments.role)
                and arguments.point in point
            ]
            if batch:
                cells.put(batch)
    write("| operation | who fails | point | fault | expected | seen | lost | lost with the killed | |")
    write("|---|---|---|---|---|---|---|---|---|")
    results: Results = []
    threads = [threading.Thread(target=work, args=(cells, results, threading.Lock())) for _ in range(arguments.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    write("\n".join(["", *summarise(results), ""]))
    write(f"{len(found & known)} of {len(known)} points are reached by these operations; the others:")
    write("\n".join(f"- {point}" for point in sorted(known - found)))
    wrong = [cell for cell, seen in results if seen.wrong]
    write(f"\n{len(results)} faults in {time.monotonic() - begun:.0f} s, {len(wrong)} with a result that must not be")
    return 1 if wrong else 0


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[2])
    sys.exit(main())
