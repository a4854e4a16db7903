"""One module for each figure; see `fedlora_simulations.bench.measure`."""
