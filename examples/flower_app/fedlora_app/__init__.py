"""A Flower app that federates LoRA with a FedLoRA strategy."""
