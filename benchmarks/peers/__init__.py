"""Servers of many languages, each restarted as its documentation says, under one load and in one run."""
