"""Whether the deep pixels of a dataset's images use equally many bits, so that white is white in all of them."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable

from nucseg.data.dataset import Sample
from nucseg.data.images import ImageWarning, used_bits
from nucseg.data.pixel_sizes import asked, named


def check_depths(samples: Iterable[Sample]) -> None:
    """Warn where images of 16-bit pixels use different numbers of bits, which makes some four times as dark as others.

    A file that does not state its bits is taken to use the fewest that hold its brightest pixel: of a camera whose
    white lies near 4095, some images then have 12 bits and others 14.

    Warns
    -----
    ImageWarning
        Once, with the bits, how many images use each, and what to do.
    """
    found: dict[int, list[str]] = defaultdict(list)
    for sample in samples:
        if bits := asked(sample, used_bits):
            found[bits].append(sample.id)
    if len(found) < 2:
        return
    groups = "; ".join(f"{len(ids)} use {bits} ({named(ids)})" for bits, ids in sorted(found.items()))
    warnings.warn(
        f"images of 16-bit pixels that use different numbers of bits, so that some are darker than others: {groups}. "
        "If one camera took them, save them all as 8-bit RGB with one range",
        ImageWarning,
        stacklevel=3,
    )
