"""`Ecdysis`: one generation of a service, from its first socket to the last of its connections.

Nothing here knows workers in the plural; what a worker asks of its anchor goes through anchor_client.py.
Read first: ecdysis.py (the public class and its block), then arriving.py, restarts.py and leaving.py.
"""
