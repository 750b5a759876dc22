"""A whole service against a simple model of it: random sequences of what can be done to one, by hypothesis.

``python -m tests.faults.model --examples 50 --steps 20`` is the long form.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.faults.cells import break_release, kill_worker, restart, take_over, upgrade
from tests.faults.harness import Kept, Service, Visitor, is_alive

__all__ = ["MODELS", "AnchoredModel", "Model", "explore"]


class Model(RuleBasedStateMachine):
    """A service without an anchor: what is done to it, and what must be true after each step.

    Known of it are its generation, its listeners, the connections that clients keep, and how many clients a kill may
    have cost. Everything else follows.
    """

    anchored = False

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory(prefix="model")
        self.service = Service(Path(self._directory.name), anchored=self.anchored)
        self.generation = 1
        self.kept: list[Kept] = []
        self.listeners = {"web"}
        self.wanted = {"web"}
        self.doomed = 0
        self.visitor: Visitor | None = None

    @initialize()
    def serve(self) -> None:
        """Wait until it serves, and visit it from then on."""
        self.service.wait_until_serving()
        self.visitor = Visitor(self.service.port()).__enter__()

    def teardown(self) -> None:
        """Stop it: nothing may be left behind, and nobody may have been refused or lost."""
        try:
            if self.visitor is not None:
                self.end_visits()
                for each in self.kept:
                    each.close()
                self.service.stop()
        finally:
            if self.visitor is not None:
                self.visitor.end()
            for each in self.kept:
                each.close()
            self.service.end()
            self._directory.cleanup()

    def end_visits(self) -> None:
        assert self.visitor is not None
        self.visitor.end()
        assert self.visitor.refused == [], self.service.log
        assert len(self.visitor.lost) <= self.doomed, (self.visitor.lost, self.service.log)

    # What clients do

    @precondition(lambda self: len(self.kept) < 3)
    @rule()
    def connect(self) -> None:
        """Keep a connection, with half of a request on it."""
        self.kept.append(Kept(self.service.port()))
        answer = self.kept[-1].ask()
        assert answer is not None
        self.kept[-1].send(b"hel")

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        """Complete the request of one, and begin the next: whoever has the connection now answers, and counts on."""
        connection = data.draw(st.sampled_from(self.kept))
        former = connection.count
        answer = connection.ask(b"lo\n")
        assert answer is not None, self.service.log
        assert answer.count == former + 1
        assert is_alive(answer.pid)
        connection.send(b"hel")

    # What operators do

    @rule()
    def restart(self) -> None:
        """Restart it."""
        assert restart(self.service) == "settled", self.service.log
        self.generation += 1
        self.listeners = set(self.wanted)

    @rule()
    def restart_into_broken_release(self) -> None:
        """Restart it into a release that does not start."""
        assert break_release(self.service) == "FAILED", self.service.log

    @rule()
    def add_listener(self) -> None:
        """Let the next generation open another socket."""
        self.want({"web", "admin"})

    @rule()
    def remove_listener(self) -> None:
        """Let the next generation do without it."""
        self.want({"web"})

    def want(self, names: set[str]) -> None:
        self.wanted = names
        (self.service.directory / "ports").write_text(" ".join(sorted(names, reverse=True)), encoding="utf-8")

    @rule()
    def stop_and_start(self) -> None:
        """Stop it, with nothing left behind, and start it anew."""
        self.end_visits()
        for each in self.kept:
            each.close()
        self.kept.clear()
        self.service.stop()
        assert all(each.poll() in (0, -signal.SIGKILL) for each in self.service.started), self.service.log
        self.service.main = self.service.start()
        self.generation, self.doomed, self.listeners = 1, 0, set(self.wanted)
        self.serve()

    # What is true at any time

    @invariant()
    def is_as_it_should_be(self) -> None:
        """See that somebody serves, and that the status tells the truth."""
        if self.visitor is None:
            return
        assert self.visitor.wait_for(lambda answer: is_alive(answer.pid)) is not None, self.service.log
        status = self.service.wait_until_serving()
        answer = self.visitor.wait_for(lambda answer: answer.pid in self.service.find_serving())
        assert answer is not None, self.service.log
        assert status["generation"] == answer.generation == self.generation, (status, answer, self.service.log)
        assert self.visitor.refused == [], self.service.log
        assert len(self.visitor.lost) <= self.doomed, self.service.log
        names = {each["name"] for each in status["listeners"]} & {"web", "admin"}
        assert names == self.listeners, (names, self.listeners, self.service.log)


class AnchoredModel(Model):
    """The same with an anchor, whose worker may die, and which may be upgraded or taken over."""

    anchored = True

    # With a change of the listeners only a restart is tried: what a single new worker makes of one is not modelled.
    @precondition(lambda self: self.wanted == self.listeners)
    @rule()
    def kill(self) -> None:
        """Kill its worker: what that has accepted dies with it, and nothing else."""
        self.doomed += 1
        assert kill_worker(self.service) == "filled", self.service.log
        for each in self.kept:
            each.close()
        self.kept.clear()

    @rule()
    def upgrade(self) -> None:
        """Replace the anchor in place."""
        assert upgrade(self.service) == "upgraded", self.service.log

    @precondition(lambda self: self.wanted == self.listeners)
    @rule()
    def take_over(self) -> None:
        """Let another anchor go on with it."""
        assert take_over(self.service) == "taken over", self.service.log
        self.generation += 1


MODELS: dict[str, type[Model]] = {"without an anchor": Model, "with an anchor": AnchoredModel}


def explore(model: type[Model], examples: int, steps: int, *, derandomize: bool) -> None:
    """Run the model against the service; raises what is not as it must be, with the steps that lead there."""
    run_state_machine_as_test(
        model,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=derandomize,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )


def main() -> None:
    """Explore both models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    for name, model in MODELS.items():
        explore(model, arguments.examples, arguments.steps, derandomize=False)
        told = f"{arguments.examples} sequences of up to {arguments.steps} steps on a service {name}"
        sys.stdout.write(f"{told}: all as it must be\n")


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[2])
    main()
