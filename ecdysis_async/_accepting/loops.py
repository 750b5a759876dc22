"""Loops whose servers pass the gate: so do all servers that ask their loop for one, such as uvicorn and aiohttp.

While an ``Ecdysis`` runs on such a loop, ``create_server`` and the like go to the data plane. Without one, and for all
that a client does, the loop is as it was. Nothing here accepts.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import os
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, Literal, TypeVar

from ecdysis_async._system.descriptors import occupy_standard_descriptors
from ecdysis_async.errors import StartupError

from . import asyncio_datagrams, asyncio_servers
from .data_plane import DataPlane, active

__all__ = ["loop_factory", "refusing_servers", "run"]

T = TypeVar("T")

LoopName = Literal["auto", "asyncio", "uvloop"]


def run(
    main: Callable[[], Coroutine[Any, Any, T]] | Coroutine[Any, Any, T],
    *,
    loop: LoopName = "auto",
    debug: bool | None = None,
) -> T:
    """Run a program on a gated loop, as ``asyncio.run`` does, and return its result.

    Args:
        main: an ``async def`` function, or its coroutine.
        loop: "auto" takes uvloop if it is installed.
        debug: the loop's debug mode; None leaves it as the environment says.

    Raises:
        ModuleNotFoundError: uvloop was asked for and is not installed.
    """
    occupy_standard_descriptors()
    with asyncio.Runner(debug=debug, loop_factory=loop_factory(loop)) as runner:
        return runner.run(main() if callable(main) else main)


def loop_factory(name: LoopName = "auto") -> Callable[[], asyncio.AbstractEventLoop]:
    """Return a factory of gated loops, for ``asyncio.Runner`` or a server that takes one.

    Raises:
        ModuleNotFoundError: uvloop was asked for and is not installed.
        ValueError: there is no loop of that name.
    """
    match name:
        case "auto":
            return _uvloop_class() if importlib.util.find_spec("uvloop") else GatedSelectorLoop
        case "asyncio":
            return GatedSelectorLoop
        case "uvloop":
            return _uvloop_class()
    raise ValueError(f'{name!r} is no loop: take "auto", "asyncio" or "uvloop"')


class _Gated(asyncio.AbstractEventLoop):
    """Lets the servers of a loop pass the gate; the loop's own methods stand behind, as ``ungated_…``."""

    async def create_server(self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        plane = _plane()
        if plane is None:
            return await super().create_server(protocol_factory, host, port, **options)
        return await asyncio_servers.create_server(plane, protocol_factory, host, port, **options)

    async def create_unix_server(self, protocol_factory: Any, path: Any = None, **options: Any) -> Any:
        plane = _plane()
        if plane is None:
            return await super().create_unix_server(protocol_factory, path, **options)
        return await asyncio_servers.create_unix_server(plane, protocol_factory, path, **options)

    async def create_datagram_endpoint(
        self, protocol_factory: Any, local_addr: Any = None, remote_addr: Any = None, **options: Any
    ) -> Any:
        plane = _plane()
        if plane is None or not asyncio_datagrams.is_service(plane, local_addr, remote_addr, options.get("sock")):
            return await super().create_datagram_endpoint(protocol_factory, local_addr, remote_addr, **options)
        return await asyncio_datagrams.create_datagram_endpoint(
            plane, protocol_factory, local_addr, remote_addr, **options
        )

    def ungated_create_server(self, *arguments: Any, **options: Any) -> Awaitable[Any]:
        return super().create_server(*arguments, **options)

    def ungated_create_unix_server(self, *arguments: Any, **options: Any) -> Awaitable[Any]:
        return super().create_unix_server(*arguments, **options)

    def ungated_create_datagram_endpoint(self, *arguments: Any, **options: Any) -> Awaitable[Any]:
        return super().create_datagram_endpoint(*arguments, **options)


class GatedSelectorLoop(_Gated, asyncio.SelectorEventLoop):
    """asyncio's loop, gated."""


@functools.cache
def _uvloop_class() -> type[asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('uvloop is not installed: pip install "ecdysis_async[uvloop]"') from error

    # uvloop's stubs are narrower than typeshed's AbstractEventLoop, method by method.
    class GatedUvloop(_Gated, uvloop.Loop):  # type: ignore[misc]
        """uvloop's loop, gated."""

    return GatedUvloop


def _plane() -> DataPlane | None:
    """Return the data plane whose ``Ecdysis`` runs on this very loop."""
    try:
        return active()
    except LookupError:
        return None


@contextlib.contextmanager
def refusing_servers(target: str, loop: LoopName = "auto") -> Iterator[None]:
    """Refuse servers that a program starts while it is imported, in the thread that imports it.

    Such a server (``uvicorn.run(app)`` without a guard) would serve for ever: the import would never end, and nobody
    would know why. A loop that only computes something, and servers in other threads, are left alone.

    Args:
        target: what is imported, for the error.
        loop: the loop of the service. A server on uvloop passes unseen where it is not this one, nor loaded already.

    Its error, a StartupError, comes out of what starts the server.
    """
    importing = threading.current_thread()
    loop_factory(loop)
    kinds: list[Any] = [asyncio.SelectorEventLoop, *([sys.modules["uvloop"].Loop] if "uvloop" in sys.modules else [])]
    kept = []

    def refuse_in(kind: Any, name: str) -> None:
        create: Callable[..., Coroutine[Any, Any, Any]] = getattr(kind, name)

        @functools.wraps(create)
        async def refusing(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread() is importing:
                raise StartupError(
                    f"{target} starts a server while it is imported{_find_importing_line()}, and would serve there for "
                    'ever: put that behind `if __name__ == "__main__":`, because `ecdysis run` is the server'
                )
            return await create(*arguments, **options)

        kept.append((kind, name, vars(kind).get(name)))
        setattr(kind, name, refusing)

    for kind in kinds:
        for name in ("create_server", "create_unix_server"):
            refuse_in(kind, name)
    try:
        yield
    finally:
        for kind, name, own in kept:
            if own is None:
                delattr(kind, name)
            else:
                setattr(kind, name, own)


def _find_importing_line() -> str:
    """Say which line of which module does what goes on now, and what it says."""
    for frame in reversed(traceback.extract_stack()):
        if frame.name == "<module>":
            return f" ({os.path.basename(frame.filename)}, line {frame.lineno}: {frame.line})"
    return ""
