"""Adapters: one module per server, which serves an application by that server and restarts it without a loss.

Each has a ``serve``, for the body of ``async with Ecdysis() as ecdysis:`` on a gated loop (``ecdysis_async.run``). An
adapter keeps to the public seams of its server where there are some, and names the others. It imports its server only
when it is imported itself.
"""
