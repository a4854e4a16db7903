"""The server: waits for clients, asks them to train, combines their updates and writes the run's results."""
