"""A Flower app that trains LoRA adapters with a FedLoRA strategy."""
