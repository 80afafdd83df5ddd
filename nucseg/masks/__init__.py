"""Mask synthesis (Sec. III-B): `synthesis` is the paper's, `hou` what it is compared with, `realism` measures both."""

from nucseg.masks.hou import hou_density, hou_polygons
from nucseg.masks.realism import STATISTICS, realism, shape_statistics
from nucseg.masks.synthesis import (
    MaskConfig,
    MaskReport,
    MaskWarning,
    Nucleus,
    Pool,
    nucleus_pool,
    synthesize_masks,
    synthesize_with_report,
)

__all__ = [
    "STATISTICS",
    "MaskConfig",
    "MaskReport",
    "MaskWarning",
    "Nucleus",
    "Pool",
    "hou_density",
    "hou_polygons",
    "nucleus_pool",
    "realism",
    "shape_statistics",
    "synthesize_masks",
    "synthesize_with_report",
]
