"""The smallest application: it says which release and which process has answered."""

import os

from fastapi import FastAPI

RELEASE = 1

app = FastAPI()


@app.get("/")
async def index() -> dict[str, int]:
    return {"release": RELEASE, "pid": os.getpid()}
