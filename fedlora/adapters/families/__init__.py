"""Adapter families, one in each file. The file's name is the family's key."""
