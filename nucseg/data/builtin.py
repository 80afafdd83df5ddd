"""``load_dataset("tissue")``: the built-in synthetic tissue as a dataset, generated when looked at, kept in memory."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nucseg.code_version import code_version
from nucseg.data.dataset import SPLITS, Dataset, Sample
from nucseg.data.tissue import SYNTHETIC_NOTE, Tissue, TissueSpec, generate_tissue, splits

GENERATOR = ("nucseg.data.tissue", "nucseg.data.tissue_drawing")  # the modules whose code makes the pixels


@dataclass(frozen=True)
class TissueSource:
    """One generated image with its exact label map."""

    spec: TissueSpec
    labelled = True
    by_region = False

    def stamp(self) -> tuple:
        """Nothing: a specification gives the same pixels for ever."""
        return ()

    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.spec.shape

    def image(self) -> np.ndarray:
        """(H, W, 3) uint8."""
        return _generate(self.spec).image

    def labels(self) -> np.ndarray:
        """(H, W) int32."""
        return _generate(self.spec).labels

    def region(self, row: int, col: int, height: int, width: int) -> np.ndarray:
        """(height, width, 3) uint8."""
        return self.image()[row : row + height, col : col + width]

    def content(self) -> bytes:
        """Digest of what determines the pixels; drawing all of them for it would take seconds in every process."""
        return hashlib.sha256(repr(self.spec).encode() + code_version(*GENERATOR).encode()).digest()


@functools.lru_cache(maxsize=64)
def _generate(spec: TissueSpec) -> Tissue:
    return generate_tissue(spec.kind, spec.shape, spec.seed)


def _recognise(samples: Sequence[Sample]) -> str:
    return f"generated on the fly: {len(samples)} images"


def load() -> Dataset:
    """Open the built-in tissue; `Sample.organ` is the tissue kind, and the data set is marked synthetic."""
    named: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    for spec in splits():
        named[spec.split].append(Sample(spec.id, TissueSource(spec), spec.kind, spec.patient, spec.seen))
    return Dataset(
        name="tissue",
        **{split: tuple(samples) for split, samples in named.items()},
        synthetic=True,
        licence="MIT, as this package; no patient's image went into it",
        note=SYNTHETIC_NOTE,
        fingerprint_of="generator code and seeds",
        recognise=_recognise,
    )
