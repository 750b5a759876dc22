"""Accepted connections: how a drain waits for them, and how they move to the next generation.

Nothing here knows a loop, a server, or who accepts; the data planes of _accepting call what is here.
Read first: tracker.py (every connection, its safe points, and the deadline of a drain).
"""
