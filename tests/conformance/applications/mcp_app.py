"""A server of the Model Context Protocol, by streamable HTTP, which keeps no sessions in its memory."""

from mcp.server.mcpserver import MCPServer
from starlette.responses import PlainTextResponse

server = MCPServer("grid")


@server.tool()
def echo(text: str) -> str:
    """Return what it was given."""
    return text


@server.custom_route("/", methods=["GET"])
async def index(request):
    return PlainTextResponse("ok")


app = server.streamable_http_app(stateless_http=True)
