"""Examples of using FedLoRA from one's own code: a strategy, and a Flower app."""
