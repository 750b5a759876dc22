"""Named sockets: created, or inherited by name and address, and closed by the one that owns them.

Nothing here accepts a connection, and nothing here talks to another process.
Read first: registry.py (the sockets of this process).
"""
