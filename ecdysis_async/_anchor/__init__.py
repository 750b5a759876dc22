"""The process in front of workers: it holds the sockets, and starts, replaces and ends the workers.

Nothing here accepts a connection or imports a server, an application or `Ecdysis`.
Read first: anchor.py (from its start to its end), then rollout.py (one restart of all workers).
"""
