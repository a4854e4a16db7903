"""Reading of users' files into checked rows of text, and their split over simulated clients."""

from fedlora.data.columns import Answer, RowFormat, column_names, unanswered
from fedlora.data.kept import kept_cells
from fedlora.data.options import ReadOptions
from fedlora.data.overview import Overview
from fedlora.data.partition import partition
from fedlora.data.problems import DataFaults
from fedlora.data.reading import read_rows
from fedlora.data.rows import (
    Rows,
    check_labels,
    in_order,
    label_names,
    labelled_by,
    labelled_otherwise,
    normalize_label,
    normalize_unit,
    rows_in_other_capitals,
    shown,
)
from fedlora.data.sources import check_there

__all__ = ["Answer", "DataFaults", "Overview", "ReadOptions", "RowFormat", "Rows", "check_labels", "check_there",
           "column_names", "in_order", "kept_cells", "label_names", "labelled_by", "labelled_otherwise",
           "normalize_label", "normalize_unit", "partition", "read_rows", "rows_in_other_capitals", "shown",
           "unanswered"]
