"""A port for metrics of the application's own, which one process has at a time."""

import asyncio
import contextlib
import os

from fastapi import FastAPI
from prometheus_client import start_http_server

from ecdysis_async import exclusive

PORT = int(os.environ.get("METRICS_PORT", "9100"))


async def serve_metrics():
    async with exclusive("metrics"):
        server, thread = start_http_server(PORT, addr="127.0.0.1")
        try:
            await asyncio.Event().wait()
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


@contextlib.asynccontextmanager
async def lifespan(app):
    task = asyncio.create_task(serve_metrics())
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


app = FastAPI(lifespan=lifespan)
