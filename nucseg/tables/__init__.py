"""Tables I to VI from results.csv alone, and what else a reader sees of it.

`table` makes one table, `notes` and `formats` its footnotes and files; `side_by_side` is Table IV of all datasets,
`strategies` makes Tables S and B, `forest` holds every comparison in one frame, `report` all of a profile's tables and
figures, `summary` the README's table.
"""

from nucseg.tables.table import (
    DATASET_NAMES,
    Measured,
    Table,
    make_table,
    make_tables,
    measure,
    named,
    one_profile,
    over_seeds,
    paired,
    why_not_compared,
    write_table,
)

__all__ = [
    "DATASET_NAMES",
    "Measured",
    "Table",
    "make_table",
    "make_tables",
    "measure",
    "named",
    "one_profile",
    "over_seeds",
    "paired",
    "why_not_compared",
    "write_table",
]
