"""MoNuSeg 2018: the 30 Kumar images to train on, 14 more to test on (REFERENCE 1.1, A4); no validation split.

The two test images of lung count as of an unseen organ, by the organisers' names, though the six training images that
are called liver are lung by their TCGA site codes.
"""

from __future__ import annotations

from pathlib import Path

from nucseg.data.dataset import Dataset, MissingData, MissingSplit
from nucseg.data.kumar import HOME, LICENCE, find_samples, recognise
from nucseg.data.layouts import rows, splits_from

NOTE = (
    "MoNuSeg's training images include all 14 Kumar test images: "
    "never evaluate on Kumar what was trained or tuned on MoNuSeg"
)
TEST_HOW_TO_GET = f"""Get "MoNuSegTestData" (14 images with XML) from {HOME}. Licence: {LICENCE}.
Unzip it into the data root beside the training data; names must keep their TCGA codes (TCGA-2Z-A9J9-...)."""


def load(root: Path) -> Dataset:
    """Load MoNuSeg; without the 14 test images only its test split is missing, and says so when it is used."""
    table = rows("monuseg")
    train = [row for row in table if row.split == "train"]
    samples = find_samples("monuseg", train, root)
    splits = splits_from(train, samples)
    test = [row for row in table if row.split == "test"]
    try:
        splits["test"] = splits_from(test, find_samples("monuseg (test split)", test, root))["test"]
    except MissingData as error:
        first_line = str(error).split("\n", 1)[0]
        splits["test"] = MissingSplit(f"{first_line}\n{TEST_HOW_TO_GET}")
    return Dataset(name="monuseg", **splits, licence=LICENCE, note=NOTE, recognise=recognise)
