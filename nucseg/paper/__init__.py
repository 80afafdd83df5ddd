"""What the paper prints: the rows of its tables, and their numbers."""

from nucseg.paper.rows import BEYOND, FIGURE_7, TABLES, Row, Spec, printed, row, rows

__all__ = ["BEYOND", "FIGURE_7", "TABLES", "Row", "Spec", "printed", "row", "rows"]
