"""Strategies: one paper, one file, whose `RECIPE` is a `Recipe` and whose class is that recipe as a Flower strategy."""
