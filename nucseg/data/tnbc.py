"""TNBC (Naylor et al.): 50 images of 512 x 512 pixels of 11 patients with triple-negative breast cancer (A3).

Found packed (``tnbc/images/NN_k.jpg`` with ``tnbc/labels/NN_k.png``) or as the official archive unzips
(``Slide_NN/NN_k.png`` with binary ``GT_NN/NN_k.png``, whose 8-connected components are the nuclei). Split by patient:
01-06 train, 07-08 val, 09-11 test. The first author counts the last 20 images as test, so printed TNBC numbers may be
over 20 images instead of 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nucseg.data.dataset import Dataset, MissingData, Sample, count_nuclei
from nucseg.data.layouts import find_tnbc_pairs, rows, searched, splits_from
from nucseg.data.sources import FileSource

LICENCE = "CC BY 4.0 (attribution), as published on Zenodo"
HOME = "https://zenodo.org/records/2579118"
HOW_TO_GET = f"""Get it with `nucseg fetch tnbc`, or TNBC_NucleiSegmentation.zip (25 MB) by hand from {HOME}
(version 1.1; the first version is https://zenodo.org/records/1175282). Licence: {LICENCE}.
Unzip it into the data root, so that it holds <root>/tnbc/.../Slide_01/01_1.png and .../GT_01/01_1.png,
and name the root with --data-root or NUCSEG_DATA."""


def load(root: Path, partial: bool = False) -> Dataset:
    """Load the 30 / 7 / 13 images of the split by patient.

    Parameters
    ----------
    root
        Data root; the images are looked for in it and up to four folders below.
    partial
        Accept that images are missing (for tests of the loader).

    Raises
    ------
    MissingData
        When an image or its mask is missing: how many, which, what to get and where to put it.
    """
    table = rows("tnbc")
    pairs = find_tnbc_pairs(root, {row.id for row in table})
    missing = [row.id for row in table if row.id not in pairs]
    if missing and not (partial and pairs):
        listed = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        raise MissingData(
            f"tnbc: found {len(table) - len(missing)} of {len(table)} images with masks {searched(root)}; "
            f"missing: {listed}.\n{HOW_TO_GET}"
        )
    samples = {}
    for row in table:
        if row.id in pairs:
            image, mask, binary = pairs[row.id]
            source = FileSource(image, mask, components=binary, decoded=True)
            samples[row.id] = Sample(row.id, source, row.organ, row.patient, row.seen)
    return Dataset(name="tnbc", **splits_from(table, samples), licence=LICENCE, recognise=recognise)


def recognise(samples: Sequence[Sample]) -> str:
    """Compare the nuclei with those of the release this project was made with, and name the images' encoding."""
    expected = {row.id: row.nuclei for row in rows("tnbc")}
    counted = {sample.id: count_nuclei(sample) for sample in samples}
    differing = [id for id, count in counted.items() if count != expected[id]]
    jpeg = any(sample.source.image_path.suffix.lower() in (".jpg", ".jpeg") for sample in samples)
    total = f"{sum(counted.values()):,} nuclei in {len(counted)} images"
    form = "images re-encoded as JPEG" if jpeg else "images as released (PNG)"
    same = "as expected" if not differing else f"counts differ from the expected ones in {', '.join(differing)}"
    return f"8-connected components of the released masks, {form}: {total}, {same}"
