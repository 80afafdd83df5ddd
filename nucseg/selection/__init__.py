"""Which patches to annotate: consistency-based patch selection (Sec. III-A) and what it is compared with."""

from nucseg.selection.config import SelectionConfig
from nucseg.selection.coverage import coverage, coverage_table, most_alike, redundancy
from nucseg.selection.cps import CPS, cps
from nucseg.selection.features import PatchFeatures, extract
from nucseg.selection.pool import nuclear_content
from nucseg.selection.selection import STRATEGIES, Selection, label_share, select
from nucseg.selection.strategies import CPS_TERMS

__all__ = [
    "CPS",
    "CPS_TERMS",
    "STRATEGIES",
    "PatchFeatures",
    "Selection",
    "SelectionConfig",
    "coverage",
    "coverage_table",
    "cps",
    "extract",
    "label_share",
    "most_alike",
    "nuclear_content",
    "redundancy",
    "select",
]
