"""The figures, one module each. `benchmarks/measure.py` says how to add one."""
