"""A pool of connections to PostgreSQL that opens with its process, and closes once the last request is answered."""

import contextlib
import os
from collections.abc import AsyncIterator

import asyncpg
from fastapi import FastAPI

DSN = os.environ.get("DATABASE_URL", "postgresql://localhost/postgres")
POOL_SIZE = int(os.environ.get("POOL_SIZE", "5"))


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    # min_size=1: a process that drains keeps few of them; max_size is what counts against max_connections.
    async with asyncpg.create_pool(DSN, min_size=1, max_size=POOL_SIZE) as pool:
        app.state.pool = pool
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/")
async def index() -> dict[str, int]:
    used = await app.state.pool.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'docs'")
    return {"connections": used, "pid": os.getpid()}
