"""What happened in restarts, told afterwards: the history is read, and shown as text, as a page and as a trace.

Nothing here runs in a service, or asks one anything; what a process says of itself now is passed in by the command.
Read first: story.py.
"""
