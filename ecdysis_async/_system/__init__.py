"""What Linux gives to any process: children, descriptors, signals, standard error, log files, threads.

Nothing here knows what a service, a socket with a name, or a restart is.
Read first: process.py (how a process is started, watched by its pidfd, and ended).
"""
