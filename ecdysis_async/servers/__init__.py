"""Adapters: one module per server, which serves an application by that server and restarts it without a loss.

Each has a ``serve``, for the body of ``async with Ecdysis() as ecdysis:`` on a gated loop (``ecdysis_async.run``). An
adapter touches nothing but the public seams of its server, and imports that server only when it is imported itself.
"""
