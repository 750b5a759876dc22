"""Every named point at which a process can be made to fail, found in the product: messages, and system calls.

A message that is added to the protocol, or a system call to the package, is a point without any further word.
"""

from __future__ import annotations

import ast
import enum
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from ecdysis_async._handoff.protocol import DrainMessage, FromPredecessor, FromSuccessor
from ecdysis_async._ipc.worker_link import FromAnchor, FromWorker

__all__ = ["ERRORS", "INJECTED", "MESSAGES", "faults_of", "find_calls", "find_messages"]

PROJECT = Path(__file__).resolve().parents[2]
PACKAGE = PROJECT / "ecdysis_async"
INJECTED = Path(__file__).parent / "injected"

MESSAGES: dict[str, tuple[type[enum.StrEnum], ...]] = {
    "handoff": (FromSuccessor, FromPredecessor, DrainMessage),
    "line": (FromAnchor, FromWorker),
}

# What runs in a service: the rest is commands, what tests a service, and what adapts other servers.
ROOMS = ("_accepting", "_anchor", "_connections", "_handoff", "_ipc", "_management", "_service", "_sockets", "_system")

# The error that a system call can really meet, where no message is its reason.
ERRORS = {
    "fcntl.fcntl": "EPERM",
    "os.dup": "EMFILE",
    "os.execve": "ENOMEM",
    "os.ftruncate": "ENOSPC",
    "os.memfd_create": "ENOMEM",
    "os.open": "EMFILE",
    "os.pidfd_open": "EMFILE",
    "os.pipe2": "EMFILE",
    "os.pwrite": "ENOSPC",
    "os.replace": "ENOSPC",
    "signal.pidfd_send_signal": "EPERM",
    "sock.accept": "EMFILE",
    "sock.bind": "EPERM",
    "sock.connect": "EPERM",
    "sock.listen": "ENOMEM",
    "sock.recvmsg": "ENOMEM",
    "sock.sendmsg": "ENOMEM",
    "socket.recv_fds": "ENOMEM",
    "socket.send_fds": "EPERM",
    "socket.socketpair": "EMFILE",
    "subprocess._fork_exec": "ENOMEM",
}


def load_injector() -> ModuleType:
    """Return the module that a process under test imports, which does nothing here."""
    spec = importlib.util.spec_from_file_location("fault_injector", INJECTED / "sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_messages() -> list[str]:
    """Return the points of all messages, sent and received."""
    found = {
        f"{conversation} {message.value!r} {way}"
        for conversation, kinds in MESSAGES.items()
        for kind in kinds
        for message in kind
        for way in ("sent", "received")
    }
    return sorted(found)


def find_calls() -> list[str]:
    """Return the points of all system calls of the package that the injector wraps."""
    paths = [PACKAGE / "cli" / "client.py", *(path for room in ROOMS for path in (PACKAGE / room).glob("*.py"))]
    return sorted({point for path in paths for point in _calls(path)})


def _calls(path: Path) -> Iterator[str]:
    seams: dict[str, tuple[object, tuple[str, ...]]] = load_injector().SEAMS
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)

    def visit(node: ast.AST, within: tuple[str, ...]) -> Iterator[str]:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                within = (*within, name, "<locals>")
            case ast.ClassDef(name=name):
                within = (*within, name)
            case ast.Call(func=ast.Name(id="_Detached") | ast.Attribute(value=ast.Name(id="subprocess"))):
                yield f"{module}:{'.'.join(within).removesuffix('.<locals>')} subprocess._fork_exec"
            case ast.Call(func=ast.Attribute(value=owner, attr=name)):
                where = ".".join(within).removesuffix(".<locals>") or "<module>"
                if isinstance(owner, ast.Name) and owner.id in seams and owner.id != "sock":
                    if name in seams[owner.id][1]:
                        yield f"{module}:{where} {owner.id}.{name}"
                elif name in seams["sock"][1]:
                    yield f"{module}:{where} sock.{name}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, within)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), ())


def faults_of(point: str) -> tuple[str, ...]:
    """Return what can go wrong at a point."""
    what = point.rpartition(" ")[2]
    match what:
        case "sent":
            return ("SIGKILL", "SIGSTOP", "slow", "garbage", "ENOMEM")
        case "received":
            return ("SIGKILL", "SIGSTOP", "slow", "EMFILE")
        case _:
            return ("SIGKILL", "SIGSTOP", "slow", ERRORS[what])
