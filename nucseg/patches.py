"""A patch: the square of an image that is chosen, outlined and trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Patch:
    """A square of one image: what a pathologist is asked to annotate (Sec. III-A).

    Attributes
    ----------
    image_id
        `Sample.id` of the image.
    row, col
        Upper left pixel.
    size
        Side in pixels.
    """

    image_id: str
    row: int
    col: int
    size: int

    def __post_init__(self):
        if self.row < 0 or self.col < 0 or self.size < 1:
            raise ValueError(
                f"Patch: row, col >= 0 and size >= 1, got row={self.row}, col={self.col}, size={self.size}"
            )

    @property
    def slices(self) -> tuple[slice, slice]:
        """Row and column slices of the patch in its image.

        Examples
        --------
        >>> Patch("slide1", row=100, col=40, size=256).slices
        (slice(100, 356, None), slice(40, 296, None))
        """
        return slice(self.row, self.row + self.size), slice(self.col, self.col + self.size)

    def crop(self, array: np.ndarray) -> np.ndarray:
        """Cut the patch out of an image (H, W, 3) or label map (H, W); a view, with the patch's full size.

        Raises
        ------
        ValueError
            If the patch does not lie inside the array.
        """
        if self.row + self.size > array.shape[0] or self.col + self.size > array.shape[1]:
            raise ValueError(f"{self} does not lie inside an array of {array.shape[0]} x {array.shape[1]} pixels")
        return array[self.slices]
