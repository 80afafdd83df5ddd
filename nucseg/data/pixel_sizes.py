"""Whether the images of a dataset were taken at one magnification, as far as their files say."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np

from nucseg.data.dataset import Sample
from nucseg.data.images import ImageError, ImageWarning, pixel_size
from nucseg.data.sources import FileSource

APART = 1.2  # times: sizes further apart are another magnification, as 20x is of 40x; scanners of one differ by 10 %
NAMED = 3  # images of a size that are named


def check_pixel_sizes(samples: Iterable[Sample]) -> None:
    """Warn where images state pixel sizes that are too far apart: nuclei are large in some and small in others.

    Only headers are read. Images that state nothing, or cannot be read, are left out: whoever reads them will say so.

    Warns
    -----
    ImageWarning
        Once, with the sizes, how many images have each, and what to do.
    """
    stated = sorted((size, sample.id) for sample in samples if (size := _stated(sample)) is not None)
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


def _stated(sample: Sample) -> float | None:
    if not isinstance(sample.source, FileSource):
        return None
    try:
        return pixel_size(sample.source.image_path)
    except (ImageError, OSError):
        return None


def _described(group: list[tuple[float, str]]) -> str:
    size = float(np.median([size for size, _ in group]))
    names = ", ".join(image_id for _, image_id in group[:NAMED])
    more = f" and {len(group) - NAMED} more" if len(group) > NAMED else ""
    return f"{len(group)} of {size:.3g} µm ({names}{more})"
