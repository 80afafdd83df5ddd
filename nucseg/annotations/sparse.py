"""A label map of which only the nuclei's pixels are held: of a whole slide a dense one would take tens of gigabytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SparseLabels:
    """Nuclei in an image of any size.

    Attributes
    ----------
    shape
        Height and width of the image.
    pixels
        (n,) int64, ascending: row times width plus column of each pixel that is not background.
    ids
        (n,) the nucleus that it belongs to.
    """

    shape: tuple[int, int]
    pixels: np.ndarray
    ids: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray) -> SparseLabels:
        """Return the nuclei of a label map (H, W)."""
        pixels = np.flatnonzero(labels)
        return cls(labels.shape, pixels, labels.ravel()[pixels])

    @classmethod
    def painted(cls, shape: tuple[int, int], pixels: np.ndarray, ids: np.ndarray) -> SparseLabels:
        """Return what is there after painting pixels one after another: the last one painted stays."""
        pixels, last = np.unique(pixels[::-1], return_index=True)
        return cls(shape, pixels, ids[::-1][last].astype(np.int32))

    def dense(self) -> np.ndarray:
        """Return the whole label map, (H, W) int32."""
        labels = np.zeros(self.shape, np.int32)
        labels.ravel()[self.pixels] = self.ids
        return labels

    def crop(self, row: int, col: int, height: int, width: int) -> np.ndarray:
        """Return a rectangle of the label map, (height, width) int32, ids as in the whole."""
        across = self.shape[1]
        part = slice(*np.searchsorted(self.pixels, (row * across, (row + height) * across)))
        rows, cols = np.divmod(self.pixels[part], across)
        inside = (cols >= col) & (cols < col + width)
        labels = np.zeros((height, width), np.int32)
        labels[rows[inside] - row, cols[inside] - col] = self.ids[part][inside]
        return labels

    def box(self, number: int) -> tuple[slice, slice]:
        """Return the rows and the columns that a nucleus spans."""
        rows, cols = np.divmod(self.pixels[self.ids == number], self.shape[1])
        return slice(int(rows.min()), int(rows.max()) + 1), slice(int(cols.min()), int(cols.max()) + 1)
