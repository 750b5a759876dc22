"""What `ecdysis run` is told: options from the command line, the environment and a file, and the target.

Nothing here opens a socket or starts anything; it says what is wanted, or what is wrong with it.
Read first: options.py (the table of all options).
"""
