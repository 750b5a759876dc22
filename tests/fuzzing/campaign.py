"""The long form of the fuzzing: atheris looks for inputs that reach new code, target by target.

``python -m tests.fuzzing.campaign`` prints a table, and ``nox -s fuzz`` does the same. A crash, a hang or a leak is
written out with its input, and the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import NoReturn

__all__ = ["Outcome"]

# After so many inputs everything is imported and cached; what grows from then on is lost.
WARM_UP = 2_000

# How many blocks of memory may be more at the end, one in so many inputs: a leak is one in each, or in a few.
INPUTS_A_BLOCK = 1_000
FEW_BLOCKS = 2_000

# After so many seconds, one input is a hang. An input takes less than a millisecond.
HANG_SECONDS = 60

# How much of what a failed target has said is shown, characters: its end.
SHOWN = 4_000


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one target came to.

    Attributes:
        name: of the target.
        inputs: how many it was given.
        seconds: how long they took.
        descriptors: how many more are open at the end than after the first inputs.
        blocks: how many more blocks Python's allocator has given away.
        failure: what was wrong; empty where nothing was.
    """

    name: str
    inputs: int = 0
    seconds: float = 0.0
    descriptors: int = 0
    blocks: int = 0
    failure: str = ""

    @property
    def is_sound(self) -> bool:
        """Whether nothing crashed, hung or leaked."""
        return not self.failure and self.descriptors <= 0 and self.blocks <= FEW_BLOCKS + self.inputs // INPUTS_A_BLOCK


def fuzz(name: str, inputs: int, seconds: float) -> NoReturn:
    """Give one target inputs, in a process of its own; write the outcome on stdout."""
    import atheris

    with atheris.instrument_imports(include=["ecdysis_async"]):
        from tests.fuzzing.targets import TARGETS

    stack = contextlib.ExitStack()
    target = stack.enter_context(TARGETS[name]())
    count = descriptors = blocks = 0
    begun = time.monotonic()

    def attack(data: bytes) -> None:
        nonlocal count, descriptors, blocks
        target(data)
        count += 1
        if count == WARM_UP:
            descriptors, blocks = measure()
        if count >= max(inputs, WARM_UP + 1) or (count > WARM_UP and time.monotonic() - begun > seconds):
            finish()

    def measure() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), sys.getallocatedblocks()

    def finish() -> NoReturn:
        took = time.monotonic() - begun
        descriptors_now, blocks_now = measure()
        outcome = Outcome(name, count, took, descriptors_now - descriptors, blocks_now - blocks)
        stack.close()
        os.write(1, json.dumps(asdict(outcome)).encode())
        # libFuzzer has no other way to end in the middle.
        os._exit(0)

    os.chdir(tempfile.mkdtemp(prefix="ecdysis-fuzz-"))
    atheris.Setup([sys.argv[0], f"-timeout={HANG_SECONDS}", "-rss_limit_mb=0", "-max_len=600"], attack)
    atheris.Fuzz()
    raise AssertionError("it has ended by itself")


def run(name: str, inputs: int, seconds: float) -> Outcome:
    """Fuzz one target in a process of its own, and return what came of it."""
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, "--only", name, "--inputs", str(inputs), "--seconds", str(seconds)],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        # libFuzzer names the input, and atheris has the traceback.
        said = [each.decode(errors="replace")[-SHOWN:] for each in (done.stdout, done.stderr)]
        return Outcome(name, failure="\n".join(said))
    return Outcome(**json.loads(done.stdout))


def main() -> int:
    """Print a table; return 0 where nothing crashed, hung or leaked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="targets; all of them where none is named")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="for each target [default: 1,000,000]")
    parser.add_argument("--seconds", type=float, default=600, help="for each target, at the most [default: 600]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        fuzz(arguments.only, arguments.inputs, arguments.seconds)
    from tests.fuzzing.targets import TARGETS

    names = arguments.names or list(TARGETS)
    sys.stdout.write("| target | inputs | a second | descriptors | blocks of memory | |\n|---|--:|--:|--:|--:|---|\n")
    outcomes = []
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as threads:
        for each in threads.map(lambda name: run(name, arguments.inputs, arguments.seconds), names):
            outcomes.append(each)
            rate = each.inputs / each.seconds if each.seconds else 0
            verdict = "sound" if each.is_sound else "**not sound**"
            figures = f"{each.inputs:,} | {rate:,.0f} | {each.descriptors:+} | {each.blocks:+,}"
            sys.stdout.write(f"| {each.name} | {figures} | {verdict} |\n")
            sys.stdout.flush()
    sys.stdout.write(f"\n{sum(each.inputs for each in outcomes):,} inputs\n")
    for each in outcomes:
        if each.failure:
            sys.stdout.write(f"\n{each.name}:\n{each.failure}\n")
    return int(not all(each.is_sound for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
