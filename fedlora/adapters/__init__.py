"""Adapter families: which tensors are frozen, trained and uploaded, and how they rebuild the update."""

from fedlora.adapters.attach import AdaptedModel, all_targets, attach, attach_planned, automatic_targets
from fedlora.adapters.export import export
from fedlora.adapters.initial import INITS, initial_tensors
from fedlora.adapters.layout import FAMILIES, AdapterLayout, Family, TensorSpec

__all__ = ["FAMILIES", "INITS", "AdaptedModel", "AdapterLayout", "Family", "TensorSpec", "all_targets", "attach",
           "attach_planned", "automatic_targets", "export", "initial_tensors"]
