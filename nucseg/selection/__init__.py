"""Which patches to annotate: consistency-based patch selection (Sec. III-A) and what it is compared with."""

from .config import SelectionConfig
from .content import nuclear_content
from .coverage import coverage, coverage_table, redundancy
from .cps import CPS, cps
from .features import PatchFeatures, extract
from .strategies import CPS_TERMS, STRATEGIES, Selection, label_share, select

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
    "nuclear_content",
    "redundancy",
    "select",
]
