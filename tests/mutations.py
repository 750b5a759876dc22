"""Mutations of the product, each of which a test has to catch: the tests can fail.

``python -m tests.mutations`` prints a table of them, and `nox -s mutations` does the same.

Each mutation is one exact change of a file in a copy of the project. Its test has to pass in the copy as it is, and to
fail with the change. A text that is not there any more, or stands there twice, is an error.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MUTATIONS", "Mutation", "MutationError"]

PROJECT = Path(__file__).resolve().parent.parent
COPIED = ("ecdysis_async", "tests", "docs", "examples", "pyproject.toml", "README.md", "CHANGELOG.md")

# pytest's exit codes for tests of which some have failed, and for none that have.
CAUGHT, PASSED = 1, 0

TIMEOUT_SECONDS = 900.0

EXPLORATION = "tests/handoff/test_protocol_exploration.py"


class MutationError(Exception):
    """A mutation cannot be made; the text says why."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """One change, and who has to notice it.

    Attributes:
        what: is wrong then, in words.
        path: of the file that is changed, below the package.
        old: the text that is changed; it stands there once.
        new: what stands there instead.
        test: which fails then.
    """

    what: str
    path: str
    old: str
    new: str
    test: str

    def apply(self, root: Path) -> None:
        """Change the file in a copy of the project.

        Raises:
            MutationError: the text is not there, or more than once.
        """
        path = root / "ecdysis_async" / self.path
        text = path.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise MutationError(
                f"{self.what}: its text stands in {self.path} {count} times, and not once: change tests/mutations.py"
            )
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


MUTATIONS = (
    Mutation(
        "COMMIT, a message, is left out",
        "_handoff/protocol.py",
        "_PE.PAUSED: (_P.COMMITTING, (_PA.SEND_COMMIT,)),",
        "_PE.PAUSED: (_P.COMMITTING, ()),",
        f"{EXPLORATION}::test_where_nothing_fails_every_restart_succeeds",
    ),
    Mutation(
        "SETTLED is lost: the predecessor leaves and has not said so",
        "_handoff/protocol.py",
        "_PE.TIMED_OUT: (_P.SETTLED, (_PA.SEND_SETTLED,)),",
        "_PE.TIMED_OUT: (_P.SETTLED, ()),",
        f"{EXPLORATION}::test_every_interleaving_keeps_the_guarantees",
    ),
    Mutation(
        "the predecessor accepts again before a committed successor is dead",
        "_handoff/protocol.py",
        "_PE.BROKEN: (_P.REVERTING, (_PA.END_SUCCESSOR,)),\n"
        "        _PE.TIMED_OUT: (_P.REVERTING, (_PA.END_SUCCESSOR,)),",
        "_PE.BROKEN: (_P.REVERTING, (_PA.END_SUCCESSOR,)),\n"
        "        _PE.TIMED_OUT: (_P.REVERTING, (_PA.RESUME, _PA.END_SUCCESSOR)),",
        f"{EXPLORATION}::test_every_interleaving_keeps_the_guarantees",
    ),
    Mutation(
        "two acceptors: the successor accepts as soon as it is ready",
        "_handoff/protocol.py",
        "_SE.READY: (_S.WAITING, (_SA.SEND_READY,)),",
        "_SE.READY: (_S.WAITING, (_SA.SEND_READY, _SA.OPEN)),",
        f"{EXPLORATION}::test_every_interleaving_keeps_the_guarantees",
    ),
    Mutation(
        "two acceptors: a pause overlooks what is being opened",
        "_accepting/gate.py",
        "            await self._wait_opened(acceptor)\n            if spare is None",
        "            if spare is None",
        "tests/accepting/test_gate.py::test_a_pause_waits_for_what_is_being_opened",
    ),
    Mutation(
        "two acceptors: the predecessor says that it has paused, and has not",
        "_handoff/predecessor.py",
        "                    if self.state is PredecessorState.PAUSING:\n"
        "                        await self.generation.host.pause(unclaimed.__contains__)\n",
        "                    pass\n",
        "tests/scenarios/handoff/test_guarantees.py::test_nobody_is_refused_and_one_generation_accepts_at_a_time",
    ),
    Mutation(
        "nobody accepts: a predecessor does not accept again when its successor has died",
        "_handoff/protocol.py",
        "_PE.DIED: (_P.FAILED, (_PA.RESUME,)),",
        "_PE.DIED: (_P.FAILED, ()),",
        f"{EXPLORATION}::test_every_interleaving_keeps_the_guarantees",
    ),
    Mutation(
        "a successor that has to be ended after the commit gets SIGTERM, and shuts the sockets of both",
        "_handoff/predecessor.py",
        "at_once = self.state is PredecessorState.REVERTING and self._spawner is None\n",
        "at_once = False\n",
        "tests/faults/test_table.py::test_a_service_goes_on_whoever_fails_wherever",
    ),
    Mutation(
        "descriptors of a frame that nobody has taken stay open",
        "_ipc/channel.py",
        "        close_all(self.descriptors)\n",
        "        pass\n",
        "tests/ipc/test_channel.py::test_close_wakes_who_waits_and_drops_what_was_received",
    ),
    Mutation(
        "a connection that was sent to the successor is sent again, so that both read from it",
        "_connections/sender.py",
        "        self._sent[self._number] = connections\n        self._batch",
        "        self._sent[self._number] = connections\n"
        "        for connection in connections:\n"
        "            self._keep(connection)\n"
        "            self._enqueue(connection)\n"
        "        self._batch",
        "tests/connections/test_sender.py::test_one_is_never_sent_twice",
    ),
    Mutation(
        "a drain that shall hurry waits to its deadline",
        "_connections/tracker.py",
        "            timeout = min(timeout, FAREWELL_SECONDS)\n",
        "            pass\n",
        "tests/connections/test_tracker.py::test_hurry_before_the_drain_shortens_it",
    ),
    Mutation(
        "what was passed to this process alone reaches a successor",
        "_system/launch.py",
        "    for key in (*PRIVATE_KEYS, *(stale_keys",
        "    for key in (*PRIVATE_KEYS[:0], *(stale_keys",
        "tests/system/test_launch.py::test_variables_of_this_process_alone_are_left_out",
    ),
    Mutation(
        "a process that ends removes the pid file of the one that has followed it",
        "_management/pid_file.py",
        "            if self.names(os.getpid()):\n",
        "            if True:\n",
        "tests/management/test_pid_file.py::test_one_that_names_another_process_stays",
    ),
    Mutation(
        "a counter falls: what the predecessor itself has counted is forgotten",
        "_service/counting.py",
        "self.ledger, self._older = ledger, {**older, pid: own}",
        "self.ledger, self._older = ledger, {**older}",
        "tests/service/test_counting.py::test_a_successor_goes_on_counting",
    ),
    Mutation(
        "a roll-out that fails in the last slot leaves the others on the new code",
        "_anchor/rollout.py",
        '    old.link.tell(FromAnchor.REVERT, {"error": error_to_json(error)})\n',
        "    _ = error_to_json(error)\n",
        "tests/anchor/test_rollout.py::test_a_failure_in_the_last_slot_takes_all_back",
    ),
)


def copy_project(root: Path) -> None:
    """Copy what a test needs."""
    for name in COPIED:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, root / name)


def run_tests(root: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Run tests of a copy; return pytest's exit code and the names of those that have failed, or its last lines."""
    # No bytecode: of two files of the same size and second, the one before would be run.
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "--tb=no", "-p", "no:cacheprovider", *tests],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    lines = done.stdout.splitlines()
    # An error is what stands around a test, such as a descriptor that it has left open.
    failed = [line.split(" - ")[0].split(" ", 1)[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return done.returncode, "\n".join(failed or lines[-5:])


def try_out(mutations: Sequence[Mutation]) -> Iterator[tuple[Mutation, str | None]]:
    """Try mutations; yield each with the name of the test that has caught it, or None.

    Raises:
        MutationError: one cannot be made, or a test fails without it as well.
    """
    with tempfile.TemporaryDirectory(prefix="ecdysis-mutations-") as directory:
        root = Path(directory)
        copy_project(root)
        code, words = run_tests(root, sorted({each.test for each in mutations}))
        if code != PASSED:
            raise MutationError(f"without any mutation, pytest has ended with {code}:\n{words}")
        for mutation in mutations:
            path = root / "ecdysis_async" / mutation.path
            before = path.read_text(encoding="utf-8")
            mutation.apply(root)
            try:
                code, words = run_tests(root, [mutation.test])
            finally:
                path.write_text(before, encoding="utf-8")
            if code not in (CAUGHT, PASSED):
                raise MutationError(f"{mutation.what}: pytest has ended with {code}:\n{words}")
            yield mutation, words if code == CAUGHT else None


def main() -> int:
    """Print a table; return 0 where each mutation is caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="?", default="", help="only mutations whose description has these words")
    words: str = parser.parse_args().words
    chosen = [each for each in MUTATIONS if words in each.what]
    missed = 0
    sys.stdout.write("| what is wrong | in | caught by |\n|---|---|---|\n")
    for mutation, caught in try_out(chosen):
        missed += caught is None
        sys.stdout.write(f"| {mutation.what} | `{mutation.path}` | {f'`{caught}`' if caught else '**nobody**'} |\n")
        sys.stdout.flush()
    sys.stdout.write(f"\n{len(chosen) - missed} of {len(chosen)} are caught.\n")
    return int(missed > 0 or not chosen)


if __name__ == "__main__":
    sys.exit(main())
