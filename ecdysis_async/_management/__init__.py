"""How a service is managed from outside: control socket, signals, systemd, pid file, status.

Nothing here knows whether it speaks for one generation or for an anchor with workers.
Read first: management.py (who speaks for a service), then control_server.py (what a command may ask).
"""
