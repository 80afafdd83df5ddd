"""Whether the images of a dataset were taken at one magnification, as far as their files say."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np

from nucseg.data.dataset import Sample
from nucseg.data.images import ImageError, ImageWarning, pixel_size
from nucseg.data.sources import FileSource

T = TypeVar("T")

APART = 1.2  # times: sizes further apart are another magnification, as 20x is of 40x; scanners of one differ by 10 %
NAMED = 3  # images that are named of many


def check_pixel_sizes(samples: Iterable[Sample]) -> None:
    """Warn where images state pixel sizes that are too far apart: nuclei are large in some and small in others.

    Only headers are read. Images that state nothing, or cannot be read, are left out: whoever reads them will say so.

    Warns
    -----
    ImageWarning
        Once, with the sizes, how many images have each, and what to do.
    """
    stated = sorted((size, sample.id) for sample in samples if (size := asked(sample, pixel_size)) is not None)
    if not stated or stated[-1][0] <= APART * stated[0][0]:
        return
    groups: list[list[tuple[float, str]]] = []
    for size, image_id in stated:
        if not groups or size > APART * groups[-1][0][0]:
            groups.append([])
        groups[-1].append((size, image_id))
    warnings.warn(
        f"images of different magnifications, by the pixel sizes that their files state: "
        f"{'; '.join(map(_described, groups))}. Nuclei are learnt and found by their size in pixels: bring the images "
        "to one pixel size, or use a folder for each",
        ImageWarning,
        stacklevel=3,
    )


def asked(sample: Sample, question: Callable[[Path], T | None]) -> T | None:
    """Return what a question about a sample's image file gives, None where there is no file or it cannot be read."""
    if not isinstance(sample.source, FileSource):
        return None
    try:
        return question(sample.source.image_path)
    except (ImageError, OSError):  # whoever reads it will say so
        return None


def named(image_ids: list[str]) -> str:
    """Name the first few images, and say how many more there are."""
    more = f" and {len(image_ids) - NAMED} more" if len(image_ids) > NAMED else ""
    return ", ".join(image_ids[:NAMED]) + more


def _described(group: list[tuple[float, str]]) -> str:
    size = float(np.median([size for size, _ in group]))
    return f"{len(group)} of {size:.3g} µm ({named([image_id for _, image_id in group])})"
