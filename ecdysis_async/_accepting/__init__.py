"""Who accepts, when, and on which loop: the gate, and the native servers and listeners behind it.

Nothing here knows a predecessor or a successor: the gate is told when to open, pause and end.
Read first: gate.py (when this process accepts), then the file of your loop.
"""
