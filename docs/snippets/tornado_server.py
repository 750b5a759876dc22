"""A server of Tornado, whose socket is handed over, and which says goodbye to those who have a connection."""

import asyncio
import logging
import os

import tornado.httpserver
import tornado.web

import ecdysis_async
from ecdysis_async import Ecdysis


class Page(tornado.web.RequestHandler):
    def prepare(self):
        if ecdysis_async.draining.is_set():
            self.set_header("Connection", "close")

    async def get(self):
        self.write(f"process {os.getpid()}")


async def main():
    async with Ecdysis() as ecdysis:
        server = tornado.httpserver.HTTPServer(tornado.web.Application([("/", Page)]))
        sock = ecdysis.listen_tcp("127.0.0.1", int(os.environ.get("PORT", "8000")))
        await ecdysis.ready()
        server.add_socket(sock)
        await ecdysis.finished()
        server.stop()
        # A client with a connection makes one more request, and is told to come back on another one.
        await asyncio.sleep(2)
        await server.close_all_connections()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    ecdysis_async.run(main)
