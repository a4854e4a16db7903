"""The seams' keys, for tests that run over every file found."""

from fedlora import registry

FAMILIES = registry.keys("fedlora.adapters.families")
STARTS = registry.keys("fedlora.adapters.starts")
