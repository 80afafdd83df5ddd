"""Mask synthesis (Sec. III-B): `pool` and `synthesis` are the paper's, `hou` its rival, `realism` measures both."""

from nucseg.masks.hou import hou_density, hou_polygons
from nucseg.masks.pool import MaskConfig, Nucleus, Pool, holds_nucleus, nucleus_pool, touching_share
from nucseg.masks.realism import STATISTICS, realism, shape_statistics
from nucseg.masks.synthesis import (
    MaskReport,
    MaskWarning,
    SynthesisSteps,
    synthesis_steps,
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
    "SynthesisSteps",
    "holds_nucleus",
    "hou_density",
    "hou_polygons",
    "nucleus_pool",
    "realism",
    "shape_statistics",
    "synthesis_steps",
    "synthesize_masks",
    "synthesize_with_report",
    "touching_share",
]
