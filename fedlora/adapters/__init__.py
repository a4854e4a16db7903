"""Adapters: families define which tensors there are, and starts define their initial values."""

from fedlora.adapters.attach import AdaptedModel, attach, attach_planned
from fedlora.adapters.export import export
from fedlora.adapters.family import Family, Site, TensorSpec, family_of
from fedlora.adapters.layout import AdapterLayout
from fedlora.adapters.merge import merge
from fedlora.adapters.provenance import Noise, Provenance, Statement
from fedlora.adapters.saved import hand_on, load, save
from fedlora.adapters.start import initial_tensors, start_of
from fedlora.adapters.targets import all_targets, automatic_targets, not_by_record

__all__ = ["AdaptedModel", "AdapterLayout", "Family", "Noise", "Provenance", "Site", "Statement", "TensorSpec",
           "all_targets", "attach", "attach_planned", "automatic_targets", "export", "family_of", "hand_on",
           "initial_tensors", "load", "merge", "not_by_record", "save", "start_of"]
