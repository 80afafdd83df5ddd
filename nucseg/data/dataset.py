"""Samples and datasets: lazy, small in memory, and with a fingerprint of what they really hold."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from nucseg.annotations import another_size
from nucseg.annotations.errors import DataError
from nucseg.config import nearest
from nucseg.data.images import ImageError, check_region
from nucseg.data.sources import CACHE, ArraySource, Source
from nucseg.labels import check_label_map, relabel

SPLITS = ("train", "val", "test")
WHOLE_IMAGE_PIXELS = 16_000_000  # regions of larger images are read from the file, smaller images are decoded whole


class MissingData(DataError, FileNotFoundError):
    """Images or annotations are not at hand; the message says what to get, from where, and where to put it."""


@dataclass(frozen=True)
class Sample:
    """One image with its label map, decoded when asked for.

    Attributes
    ----------
    id
        Unique within the dataset.
    source
        Where the pixels come from.
    organ, patient
        Text, ``""`` where unknown.
    seen
        Whether the organ is among those of the training images (Table V).
    """

    id: str
    source: Source = field(repr=False)
    organ: str = ""
    patient: str = ""
    seen: bool = True

    @classmethod
    def from_arrays(cls, id: str, image: np.ndarray, labels: np.ndarray | None = None, **about) -> Sample:
        """Make a sample of an image (H, W, 3) uint8 and a label map (H, W) or None that are in memory."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ImageError(f"{id}: an image is (H, W, 3) uint8, got {image.shape} {image.dtype}")
        if labels is not None:
            labels = check_label_map(labels).astype(np.int32)
            if labels.shape != image.shape[:2]:
                raise DataError(
                    f"{id}: the image is {image.shape[:2]} pixels, but its label map is {labels.shape}; "
                    f"{another_size(image.shape[:2], labels.shape)}"
                )
        return cls(id, ArraySource(image, labels), **about)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels, from the file's header."""
        return self.source.shape()

    @property
    def labelled(self) -> bool:
        """Whether there is a label map, without reading it."""
        return self.source.labelled

    @property
    def image(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB; a copy that the caller owns, from a cache of recently decoded images."""
        return self._cached_image().copy()

    @property
    def labels(self) -> np.ndarray | None:
        """(H, W) int32 label map, 0 = background; a copy that the caller owns; None for an unlabelled image."""
        return None if not self.labelled else self._cached_labels().copy()

    def region(self, row: int, col: int, height: int, width: int) -> np.ndarray:
        """Cut one rectangle of the image, (height, width, 3) uint8; of a large image only that part is read."""
        shape = self.shape
        check_region(self.id, shape, row, col, height, width)
        if self.source.by_region and shape[0] * shape[1] > WHOLE_IMAGE_PIXELS:
            return self.source.region(row, col, height, width)
        return self._cached_image()[row : row + height, col : col + width].copy()

    def content_digest(self) -> bytes:
        """SHA-256 over what `Source.content` gives, computed once per process."""
        return _content_digest(self.source, self.source.stamp())

    def _cached_image(self) -> np.ndarray:
        if isinstance(self.source, ArraySource):  # in memory already
            return self.source.pixels
        return CACHE.get(("image", self.source, self.source.stamp()), self.source.image)

    def _cached_labels(self) -> np.ndarray:
        if isinstance(self.source, ArraySource):
            return self.source.label_map
        return CACHE.get(("labels", self.source, self.source.stamp()), self.source.labels)


class MissingSplit(Sequence):
    """A split that is not at hand: looking into it raises `MissingData` with what to get."""

    def __init__(self, message: str):
        self.message = message

    def __len__(self) -> int:
        raise MissingData(self.message)

    def __getitem__(self, index):
        raise MissingData(self.message)

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class Dataset:
    """Samples in three splits.

    Attributes
    ----------
    name
        ``"kumar"``, ``"monuseg"``, ``"tnbc"``, ``"tissue"`` or the folder's name.
    train, val, test
        Sequences of `Sample`; empty where the dataset has no such split.
    synthetic
        True for the built-in tissue: every figure and table made from it must say so.
    licence
        Of images and annotations.
    note
        What every reader of a result must know, for example that the images are synthetic; or ``""``.
    fingerprint_of
        ``"decoded pixels"``, ``"file bytes"`` or ``"generator code and seeds"``: what `fingerprint` hashes.
    recognise
        Gives the text of `version`.
    """

    name: str
    train: Sequence[Sample]
    val: Sequence[Sample] = ()
    test: Sequence[Sample] = ()
    synthetic: bool = False
    licence: str = "unknown"
    note: str = ""
    fingerprint_of: str = "decoded pixels"
    recognise: Callable[[Sequence[Sample]], str] | None = field(default=None, repr=False)

    def __post_init__(self):
        ids = [sample.id for sample in self.samples]
        twice = sorted({id for id in ids if ids.count(id) > 1}) if len(set(ids)) < len(ids) else []
        if twice:
            raise DataError(f"{self.name}: two images have the id {', '.join(twice[:5])}; ids must be unique")

    @property
    def splits(self) -> dict[str, Sequence[Sample]]:
        """The splits at hand by name, empty ones left out."""
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {name: samples for name, samples in named.items() if samples}

    def require(self, *splits: str) -> None:
        """Raise what `measurable` raises if an experiment could not use one of these splits."""
        for split in splits:
            self.measurable(split)

    def check_experiments(self) -> None:
        """Raise what `measurable` raises if experiments could not train, validate (where there is a split) and test."""
        self.require("train", "test", *(["val"] if self.val else []))

    def measurable(self, split: str) -> Sequence[Sample]:
        """Return the ``"train"``, ``"val"`` or ``"test"`` images, all with labels: what an experiment needs.

        Raises
        ------
        MissingData
            If the split is not at hand, is empty, or some of its images have no labels: what to get, or to put where.
        """
        samples = {"train": self.train, "val": self.val, "test": self.test}[split]
        if not len(samples):
            raise MissingData(
                f"{self.name}: no {split} images; in a folder of your own they lie in {split}/, with labels"
            )
        if bare := [sample.id for sample in samples if not sample.labelled]:
            more = f" and {len(bare) - 5} more" if len(bare) > 5 else ""
            raise MissingData(f"{self.name}: {split} images without labels: {', '.join(bare[:5])}{more}")
        return samples

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All samples at hand: train, then val, then test."""
        return tuple(sample for samples in self.splits.values() for sample in samples)

    def sample(self, id: str) -> Sample:
        """Return the sample of that id.

        Raises
        ------
        KeyError
            With the nearest id.
        """
        by_id = {sample.id: sample for sample in self.samples}
        if id not in by_id:
            raise KeyError(f"{self.name}: no image {id!r}; {nearest(id, by_id)}")
        return by_id[id]

    @functools.cached_property
    def version(self) -> str:
        """Which release this is, recognised by its nuclei counts where several circulate."""
        return self.recognise(self.samples) if self.recognise is not None else "as found"

    @functools.cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits over ids, splits, images and labels (SHA-256 of `fingerprint_of`).

        Of decoded pixels it is the same for every file format; of file bytes (folders, whose images may be huge) it
        changes when a file is compressed anew.
        """
        return _fingerprint((split, sample) for split, samples in self.splits.items() for sample in samples)

    def describe(self):
        """Count what is there.

        Returns
        -------
        pandas.DataFrame
            A row per split and ``total``; columns ``images``, ``labelled`` (images with a label map), ``nuclei``,
            ``foreground`` (share of annotated pixels inside nuclei, in [0, 1]), ``annotated_pixels``, ``pixels``,
            ``fingerprint``. Its ``attrs`` hold name, version, licence and note.
        """
        import pandas as pd

        rows = {}
        for split, samples in (*self.splits.items(), ("total", self.samples)):
            counts = [_count(sample.source, sample.source.stamp()) for sample in samples if sample.labelled]
            nuclei, inside, annotated = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0, 0)
            rows[split] = {
                "images": len(samples),
                "labelled": len(counts),
                "nuclei": nuclei,
                "foreground": inside / annotated if annotated else float("nan"),
                "annotated_pixels": annotated,
                "pixels": sum(sample.shape[0] * sample.shape[1] for sample in samples),
                "fingerprint": self.fingerprint if split == "total" else _fingerprint((split, s) for s in samples),
            }
        table = pd.DataFrame.from_dict(rows, orient="index")
        table.index.name = "split"
        about = {"name": self.name, "version": self.version, "licence": self.licence, "note": self.note}
        table.attrs.update(about)
        return table


@functools.lru_cache(maxsize=65536)
def _content_digest(source: Source, stamp: tuple) -> bytes:
    return source.content()


@functools.lru_cache(maxsize=65536)
def _count(source: Source, stamp: tuple) -> tuple[int, int, int]:
    """Nuclei, pixels inside nuclei and all pixels of a labelled source; decoded once per process."""
    labels = CACHE.get(("labels", source, stamp), source.labels)
    return int(relabel(labels).max(initial=0)), int(np.count_nonzero(labels)), int(labels.size)


def count_nuclei(sample: Sample) -> int:
    """Distinct ids in a labelled sample's label map, counted once per process."""
    return _count(sample.source, sample.source.stamp())[0]


def _fingerprint(samples) -> str:
    digest = hashlib.sha256()
    for split, sample in samples:
        digest.update(f"{split}\0{sample.id}\0".encode())
        digest.update(sample.content_digest())
    return digest.hexdigest()[:12]
