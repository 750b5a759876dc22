"""The process in front of workers: it holds the sockets, and starts, replaces and ends the workers.

Nothing here accepts a connection or imports a server, an application or `Ecdysis`.
Read first: state.py (what an anchor knows), then anchor.py (its start and end) and rollout.py (a restart of all).
"""
