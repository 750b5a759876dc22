"""Strawberry: a subscription in GraphQL that counts."""

import asyncio
import itertools
from collections.abc import AsyncGenerator

import strawberry
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from strawberry.asgi import GraphQL


@strawberry.type
class Query:
    ok: str = "ok"


@strawberry.type
class Subscription:
    @strawberry.subscription
    async def count(self, after: int) -> AsyncGenerator[int, None]:
        for number in itertools.count(after + 1):
            yield number
            await asyncio.sleep(0.05)


async def index(request):
    return PlainTextResponse("ok")


graphql = GraphQL(strawberry.Schema(Query, subscription=Subscription))
app = Starlette(routes=[Route("/", index), Mount("/graphql", graphql)])
