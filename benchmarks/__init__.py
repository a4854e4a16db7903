"""Benchmarks of the cost of privacy and federation, as ratios of things measured in turn.

Run them from a checkout: `python -m benchmarks --help`. They are not part of the installed package.
`benchmarks.measure` says how a figure is measured and how to add one; `benchmarks/results` holds each release's result
files.
"""
