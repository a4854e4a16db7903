"""Users' files as checked rows of text, and their split over simulated clients."""

from fedlora.data.partition import partition
from fedlora.data.reading import check_there, read
from fedlora.data.rows import (
    Rows,
    check_labels,
    in_order,
    label_names,
    labelled_otherwise,
    normalize_label,
    normalize_unit,
)

__all__ = ["Rows", "check_labels", "check_there", "in_order", "label_names", "labelled_otherwise", "normalize_label",
           "normalize_unit", "partition", "read"]
