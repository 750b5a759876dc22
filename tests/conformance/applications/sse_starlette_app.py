"""sse-starlette: numbers as events, which go on behind the last one that the client has had."""

import asyncio
import itertools

from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route


async def index(request):
    return PlainTextResponse("ok")


async def events(request):
    async def count():
        for number in itertools.count(int(request.headers.get("last-event-id", "0")) + 1):
            yield {"id": str(number), "data": str(number)}
            await asyncio.sleep(0.05)

    return EventSourceResponse(count())


app = Starlette(routes=[Route("/", index), Route("/events", events)])
