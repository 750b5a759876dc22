"""What `ecdysis prove` does: load on loopback, restarts and kills meanwhile, and a verdict on each request.

A service is seen from outside only: by its address, its control socket and /proc. Nothing here is part of one.
Read first: campaign.py (one proof from start to verdict), then rules.py (what a history has to fulfil).
"""
