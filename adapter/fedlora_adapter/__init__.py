"""Tools for finished adapters: any LoRA folder that PEFT wrote, on a CPU and without a network."""
