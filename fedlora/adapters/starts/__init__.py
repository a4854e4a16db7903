"""Starts, the initial values of an adapter, one in each file. The file's name is the start's key."""
