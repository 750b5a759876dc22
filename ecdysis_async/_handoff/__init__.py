"""One restart, from both sides: the protocol, what each side does, and what a failure is called.

Nothing here knows signals, systemd, the command or an anchor; what begins a restart stands above.
Read first: protocol.py (the pure state machines), then predecessor.py and successor.py.
"""
