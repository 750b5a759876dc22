"""The sockets, the TLS context and the access log that the options ask for, for servers of all kinds."""

from __future__ import annotations

import functools
import logging
import socket
import ssl
from collections.abc import Sequence

from ecdysis_async._accepting.data_plane import active
from ecdysis_async._config.options import Options
from ecdysis_async._sockets.addresses import resolve
from ecdysis_async._sockets.registry import listen
from ecdysis_async._system.threads import run_in_thread
from ecdysis_async.errors import StartupError

__all__ = ["CERT_REQS", "describe", "is_access_logged", "make_ssl_context", "open_sockets"]

CERT_REQS = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}


async def open_sockets(options: Options) -> list[socket.socket]:
    """Return the sockets of all addresses, from the ``Ecdysis``: inherited, passed by systemd, or new.

    Raises:
        StartupError: a socket cannot be had; the text says why.
    """
    registry, entries = active().registry, []
    try:
        for address in options.bind:
            # In a thread, because a name server may be asked.
            for numeric in await run_in_thread(functools.partial(resolve, address)):
                entries += listen(registry, numeric, backlog=options.backlog, **options.unix_permissions)
    except (OSError, LookupError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else error.args[0]
        raise StartupError(str(text)) from error
    return [entry.sock for entry in entries]


def describe(server: str, socks: Sequence[socket.socket], *places: object) -> str:
    """Name a server by where it listens: on sockets, or else on the places that it was told of."""
    registry = active().registry
    found = [str(entry) for sock in socks if (entry := registry.find(sock)) is not None]
    where = ", ".join(found or [str(each) for each in places if each is not None])
    return f"{server} on {where}" if where else server


def is_access_logged(options: Options, logger: str) -> bool:
    """Say whether an access log is wanted, and its logger lets it through by now.

    Servers make the arguments of each line, and some of them much more, before they ask the logger.
    """
    return options.access_log and logging.getLogger(logger).isEnabledFor(logging.INFO)


def make_ssl_context(options: Options) -> ssl.SSLContext | None:
    """Make the TLS context of a server of HTTP/1.1; return None where the options name no certificate.

    Raises:
        StartupError: certificate or key cannot be read, or do not fit.
    """
    if options.certfile is None:
        return None
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(options.certfile, options.keyfile, options.keyfile_password)
        if options.ca_certs is not None:
            context.load_verify_locations(options.ca_certs)
        context.verify_mode = CERT_REQS[options.cert_reqs]
        if options.ciphers is not None:
            context.set_ciphers(options.ciphers)
    except (OSError, ssl.SSLError) as error:
        raise StartupError(f"TLS cannot be served with {options.certfile}: {error}") from error
    return context
