"""Figures 3 to 7 by file: `selection` (3, 6), `masks` (4), `csingan` (5), `segmentation` (7); and `synthesis`."""

from nucseg.figures.style import curves, outline, panels, save, sign, signed

__all__ = ["curves", "outline", "panels", "save", "sign", "signed"]
