"""Users' files as checked rows of text, and their split over simulated clients."""

from fedlora.data.partition import partition
from fedlora.data.reading import Answer, RowFormat, check_there, column_names, read_rows
from fedlora.data.rows import (
    Rows,
    check_labels,
    in_order,
    label_names,
    labelled_otherwise,
    normalize_label,
    normalize_unit,
)

__all__ = ["Answer", "RowFormat", "Rows", "check_labels", "check_there", "column_names", "in_order", "label_names",
           "labelled_otherwise", "normalize_label", "normalize_unit", "partition", "read_rows"]
