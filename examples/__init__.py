"""What is done with FedLoRA from outside of it."""
