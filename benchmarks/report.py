"""Writes what was measured into the pages: tables between their markers, and pictures beside them.

``python -m benchmarks.report`` after the runs whose results are to be shown: each wrote a file to ``results``. A test
holds the pages against these files.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.bench import Table
from benchmarks.peers.results import Result, Run
from benchmarks.peers.tables import describe_failures, full_name, mean, tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PAGES", "put_into"]

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "benchmarks" / "results"
PAGES_DIRECTORY = PROJECT / "docs"
PICTURES = PAGES_DIRECTORY / "numbers"

# The time lines stand in so many columns, each so large, in inches.
COLUMNS = 3
SIZE = (4.2, 1.9)

# Of an answer, milliseconds.
LIMITS = (0.2, 20_000)


def read_peers() -> Run:
    """Return the run of the peers that is kept."""
    return Run.read(RESULTS / "peers.json")


def write_peers() -> str:
    """Write all tables of the peers, and where they come from."""
    run = read_peers()
    parts = [f"{run.machine}, {run.date}. Everything in these tables is of one run.", describe_load(run)]
    return "\n\n".join([*parts, *(str(table).strip() for table in tables(run))])


def describe_load(run: Run) -> str:
    """Say how sure one may be that the load was not what was slow."""
    share = max(result.load_cpu for result in run.results)
    late = max(result.load_late.p99 for result in run.results)
    return (
        f"The load took at most {share:.0%} of one processor, and made 99 % of its new connections at most "
        f"{late:.1f} ms later than they were due; their latency is counted from when they were due."
    )


def write_measured() -> str:
    """Write the table beside the comparison."""
    run = read_peers()
    table = Table(
        "In one run",
        [
            *("server", "restarted by", "failed per restart", "connections closed, of those held"),
            *("first answer of new code beyond the own start, s", "after a broken release answers"),
        ],
    )
    for result in run.results:
        first = [restart.first_answer for restart in result.restarts if restart.first_answer is not None]
        closed = mean(restart.closed + restart.dismissed for restart in result.restarts)
        broken = result.broken
        table.add(
            full_name(result),
            result.how,
            describe_failures(result),
            f"{closed} of {result.held}" if result.keeps_connections else "keeps none",
            f"{min(first) - result.cold:+.2f}" if first else "none came",
            "-" if broken is None else "nothing" if broken.answer is None else "the release before",
        )
    _, _, text = str(table).partition("\n\n")
    return f"{run.machine}, {run.date}.\n\n{text.strip()}"


def write_tables(name: str) -> str:
    """Write the tables of one benchmark as they were printed."""
    run = json.loads((RESULTS / f"{name}.json").read_text())
    parts = [Table(each["title"], each["columns"], each["note"], each["rows"]) for each in run["tables"]]
    return "\n\n".join([f"{run['machine']}, {run['date']}.", *(str(part).strip() for part in parts)])


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "numbers.md": {
        "peers": write_peers,
        "restart": partial(write_tables, "restart"),
        "scale": partial(write_tables, "scale"),
    },
    "comparison.md": {"measured": write_measured},
}


def put_into(name: str, page: str) -> str:
    """Return a page with its generated parts replaced by those that the results make.

    Raises:
        ValueError: the page has no place for one of them.
    """
    for part, write in PAGES[name].items():
        begin, end = f"<!-- {part} -->\n", f"<!-- end of {part} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"{name} needs exactly one pair of markers for {part}")
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{write()}\n\n{end}{rest.partition(end)[2]}"
    return page


def draw_timelines(run: Run) -> Figure:
    """Draw the time around a restart of each peer."""
    from matplotlib.figure import Figure

    rows = -(-len(run.results) // COLUMNS)
    figure = Figure(figsize=(SIZE[0] * COLUMNS, SIZE[1] * rows), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flat
    for axes, result in zip(grid, run.results, strict=False):
        draw_timeline(axes, result)
    for axes in list(grid)[len(run.results) :]:
        axes.set_axis_off()
    figure.supxlabel("seconds since the restart was asked for", fontsize="small")
    figure.supylabel("longest answer, ms; a red x: requests failed", fontsize="small")
    return figure


def draw_timeline(axes: Axes, result: Result) -> None:
    """Draw the longest answers of one peer, what failed, and who answered."""
    line = result.timeline
    times = [line.start + step * line.step for step in range(len(line.worst))]
    axes.set_title(f"{result.name}, {result.how}", fontsize="x-small")
    axes.set_yscale("log")
    axes.set_ylim(*LIMITS)
    axes.set_xlim(-0.5, 6)
    axes.tick_params(labelsize="x-small")
    axes.axvline(0, color="black", linewidth=0.6)
    for answers, color in ((line.old, "tab:gray"), (line.new, "tab:green")):
        for begin, end in find_runs(answers):
            axes.axvspan(times[begin], times[end - 1] + line.step, color=color, alpha=0.15, linewidth=0)
    worst = [value or float("nan") for value in line.worst]
    axes.step(times, worst, where="post", color="tab:blue", linewidth=0.8)
    failed = [time for time, number in zip(times, line.failed, strict=True) if number]
    axes.plot(failed, [LIMITS[1] / 4] * len(failed), "x", color="tab:red", markersize=4)


def find_runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return where each run of numbers that are not 0 begins, and where it ends: its last index and one."""
    runs = []
    index = 0
    for is_there, run in itertools.groupby(numbers, bool):
        length = len(list(run))
        if is_there:
            runs.append((index, index + length))
        index += length
    return runs


def round_coordinates(picture: str) -> str:
    """Return an SVG picture with two decimals: nobody sees the others, and they are half of it."""
    return re.sub(r"(?<=\d\.\d\d)\d+", "", picture)


def main() -> None:
    """Write all pages and all pictures anew."""
    import matplotlib as mpl

    for name in PAGES:
        path = PAGES_DIRECTORY / name
        path.write_text(put_into(name, path.read_text()))
    # The same results make the same picture.
    mpl.rcParams.update({"svg.hashsalt": "", "svg.fonttype": "none"})
    PICTURES.mkdir(exist_ok=True)
    picture = io.StringIO()
    draw_timelines(read_peers()).savefig(picture, format="svg", metadata={"Date": None})
    (PICTURES / "timelines.svg").write_text(round_coordinates(picture.getvalue()))


if __name__ == "__main__":
    main()
