"""What is changed in the protocol classes of other people's servers, one file for each.

Only here are the inner parts of a server touched; each seam is named where it is used.
Read first: http.py (which connections may move), then the file of your server.
"""
