"""One module for each figure; see `benchmarks.measure`."""
