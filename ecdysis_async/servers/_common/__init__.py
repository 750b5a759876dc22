"""What the adapters of several servers share: ASGI, goodbyes, proxy headers, TLS, options.

Nothing here imports a server, or changes one.
Read first: goodbye.py (how connections of any server end at a drain).
"""
