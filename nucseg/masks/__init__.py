"""Mask synthesis (Sec. III-B): label maps that look like the tissue of one annotated patch."""

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
    "MaskConfig",
    "MaskReport",
    "MaskWarning",
    "Nucleus",
    "Pool",
    "nucleus_pool",
    "synthesize_masks",
    "synthesize_with_report",
]
