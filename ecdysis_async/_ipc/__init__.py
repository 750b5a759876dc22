"""How the processes of one service talk: frames with descriptors over Unix sockets.

What the messages of a restart mean stands in _handoff; nothing here decides anything.
Read first: channel.py (one frame after the other, with the descriptors that belong to it).
"""
