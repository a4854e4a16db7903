"""FedLoRA: federated fine-tuning of language models with low-rank adapters under differential privacy."""

__version__ = "0.1.0"
