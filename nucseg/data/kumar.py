"""Kumar: 30 images of 1000 x 1000 pixels, 7 organs (REFERENCE 1.1, A1, A2); also the training part of MoNuSeg 2018.

Found in two forms: packed (``kumar/images/<id>.webp`` with ``kumar/labels/<id>.png``) and the official release as it
unzips (``Tissue Images/<id>.tif`` with ``Annotations/<id>.xml``). Organ names are those of the literature; the images
called liver carry lung tissue-source codes in TCGA.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nucseg.data.dataset import Dataset, MissingData, Sample, count_nuclei
from nucseg.data.layouts import Row, find_tcga_pairs, rows, searched, splits_from
from nucseg.data.sources import FileSource

LICENCE = "CC BY-NC-SA 4.0 (non-commercial, share-alike), as stated with the challenge data; slides from TCGA"
HOME = "https://monuseg.grand-challenge.org/Data/"
# replaced by the organisers in September 2019 under unchanged names (REFERENCE 9)
REPLACED = ("A7-A13E", "B0-5711", "21-5784", "AY-A8YK", "B0-5698", "B0-5710", "CH-5767")
SAME = 0.02  # relative difference of counts within which two releases of an image's annotation are taken as one
HOW_TO_GET = f"""Get "MoNuSeg 2018 Training Data" (30 images with XML) from {HOME}
(a form or a drive, so it cannot be fetched for you; `nucseg fetch kumar` lists the steps). Licence: {LICENCE}.
Unzip it into the data root, so that it holds <root>/kumar/.../Tissue Images/*.tif and .../Annotations/*.xml,
and name the root with --data-root or NUCSEG_DATA."""


def load(root: Path, partial: bool = False) -> Dataset:
    """Load the 12 / 4 / 14 images of the split of REFERENCE 1.1.

    Parameters
    ----------
    root
        Data root; the images are looked for in it and up to four folders below.
    partial
        Accept that images are missing (for tests of the loader).

    Raises
    ------
    MissingData
        When an image or its annotation is missing: how many, which, what to get and where to put it.
    """
    samples = find_samples("kumar", rows("kumar"), root, partial)
    return Dataset(
        name="kumar",
        **splits_from(rows("kumar"), samples),
        licence=LICENCE,
        recognise=recognise,
    )


def find_samples(name: str, table: Sequence[Row], root: Path, partial: bool = False) -> dict[str, Sample]:
    """Find the images and annotations of a table's rows; by id of the row."""
    pairs = find_tcga_pairs(root, {row.patient for row in table})
    missing = [row.id for row in table if row.patient not in pairs]
    if missing and not (partial and pairs):
        found = len(table) - len(missing)
        listed = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise MissingData(
            f"{name}: found {found} of {len(table)} images with annotations {searched(root)}; "
            f"missing: {listed}.\n{HOW_TO_GET}"
        )
    return {
        row.id: Sample(row.id, FileSource(*pairs[row.patient], decoded=True), row.organ, row.patient, row.seen)
        for row in table
        if row.patient in pairs
    }


def recognise(samples: Sequence[Sample]) -> str:
    """Say which of the two circulating versions this is, by the nuclei counted in each image."""
    expected = {row.patient: row.nuclei for row in rows("monuseg")}
    counted = {sample.patient: count_nuclei(sample) for sample in samples}
    other = [
        patient
        for patient, count in counted.items()
        if abs(count - expected[patient]) > max(1, SAME * expected[patient])
    ]
    total = f"{sum(counted.values()):,} nuclei in {len(counted)} images"
    if not other:
        return f"current release (September 2019 or later): {total}"
    codes = [patient.removeprefix("TCGA-") for patient in other]
    replaced_at_hand = [code for code in REPLACED if f"TCGA-{code}" in counted]
    if sorted(codes) == sorted(replaced_at_hand):
        return f"older release (before September 2019, seven files since replaced): {total}"
    return f"unknown release: {total}; counts differ from the current release in {', '.join(codes)}"
