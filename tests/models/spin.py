"""Runs spin, which proves the claims of a model in Promela; ``python -m tests.models.spin`` prints the long table.

The long form has two slots: some millions of states for each claim, and minutes. ``python -m tests.models.spin plain``
walks through one scenario only.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CLAIMS", "DEFECTS", "MODEL", "SCENARIOS", "Verdict", "find_missing", "verifier"]

MODEL = Path(__file__).with_name("anchor.pml")

CLAIMS = {
    "g1": "somebody holds the sockets at every moment",
    "g2": "two generations of a slot never accept together",
    "g5": "a predecessor whose successor dies in its probation accepts again",
    "g6": "a successor whose predecessor dies completes its start, and serves",
    "served": "whoever dies, each slot is served again",
    "g10": "whoever leaves ends, and at a stop everybody does",
    "all_or_none": "no new worker goes on in a service that was taken back",
}

# What befalls the service besides a roll-out, an upgrade of the anchor and the death of a worker.
SCENARIOS = ("plain", "STOPS", "TAKEOVER", "ANCHOR_DIES")

# What the model does wrong where that name is defined, the claim that finds it, and the scenario that it takes.
DEFECTS = {
    "DEFECT_LETS_GO_BEFORE_TAKEN": ("g1", "TAKEOVER"),
    "DEFECT_RESUMES_BEFORE_DEATH": ("g2", "plain"),
    "DEFECT_DOES_NOT_RESUME": ("g5", "plain"),
    "DEFECT_SETTLES_WITHOUT_A_LOOK": ("g5", "plain"),
    "DEFECT_NOBODY_IS_PROMOTED": ("g6", "plain"),
    "DEFECT_EMPTY_SLOTS_STAY": ("served", "plain"),
    "DEFECT_NO_EXIT_DEADLINE": ("g10", "plain"),
    "DEFECT_ONE_SLOT_STAYS": ("all_or_none", "SLOTS=2"),
}

# How long one claim may take, of the long form too, seconds.
PATIENCE_SECONDS = 3600

LONG = ("SLOTS=2", "DEATHS=1")


@dataclass(frozen=True)
class Verdict:
    """What spin says of a claim.

    Attributes:
        holds: whether no run of the model breaks it.
        states: how many states were visited.
        output: all that was printed.
    """

    holds: bool
    states: int
    output: str


def find_missing() -> list[str]:
    """Return the programs that are needed, and not there."""
    return [name for name in ("spin", "gcc") if shutil.which(name) is None]


@contextlib.contextmanager
def verifier(*definitions: str) -> Iterator[Callable[[str], Verdict]]:
    """Let spin and the compiler make a program of the model; what is returned proves a claim by its name.

    Args:
        definitions: names that are defined for the preprocessor, such as ``SLOTS=2``.

    Raises:
        subprocess.CalledProcessError: the model is none, or was not walked through to its end.
        subprocess.TimeoutExpired: it took too long.
    """
    with tempfile.TemporaryDirectory() as directory:

        def run(*command: str) -> str:
            return subprocess.run(
                command, cwd=directory, check=True, stdout=subprocess.PIPE, text=True, timeout=PATIENCE_SECONDS
            ).stdout  # fmt: skip

        def prove(claim: str) -> Verdict:
            # Liveness (-a) of processes that all go on, if they can (-f).
            output = run("./verifier", "-a", "-f", "-m300000", "-N", claim)
            errors = re.search(r"errors: (\d+)", output)
            states = re.search(r"(\d+) states, stored", output)
            if errors is None or states is None or "max search depth too small" in output:
                raise subprocess.CalledProcessError(1, "verifier", output)
            return Verdict(errors[1] == "0", int(states[1]), output)

        run("spin", "-a", *(f"-D{each}" for each in definitions), str(MODEL))
        # States are kept in a quarter of the memory, for twice the time.
        run("gcc", "-O1", "-DCOLLAPSE", "-DNFAIR=4", "-DVECTORSZ=2048", "-o", "verifier", "pan.c")
        yield prove


def main() -> None:
    """Prove every claim for two slots in every scenario, and print a table."""
    print("| scenario | claim | what it says | states | verdict |\n|---|---|---|---|---|")  # noqa: T201 - it is for that
    for scenario in sys.argv[1:] or SCENARIOS:
        with verifier(scenario, *LONG) as prove:
            for claim, text in CLAIMS.items():
                verdict = prove(claim)
                word = "holds" if verdict.holds else "BROKEN"
                print(f"| {scenario} | {claim} | {text} | {verdict.states:,} | {word} |", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
