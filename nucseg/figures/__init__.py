"""Figures 3 to 7, one file each room: `selection` (3, 6), `masks` (4), `csingan` (5), `synthesis`, `segmentation` (7)."""

from nucseg.figures.style import curves, outline, panels, save, sign

__all__ = ["curves", "outline", "panels", "save", "sign"]
