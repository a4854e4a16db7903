"""The client: trains beside private data and sends noised adapters. It imports neither server nor strategies."""
