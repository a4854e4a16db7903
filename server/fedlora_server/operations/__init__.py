"""What whoever keeps a running server alive has at hand: status and stop, metrics, and commands run at events."""
