"""Where pixels come from: files or arrays (the built-in tissue has its own source), and the cache of decoded ones."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from nucseg.annotations import another_size, read_labels, read_xml
from nucseg.annotations.errors import DataError
from nucseg.annotations.geojson import read_geojson
from nucseg.data.images import file_stamp, image_shape, read_image, read_region, reads_regions

CACHE_BYTES = 320 * 2**20  # decoded arrays kept by one process: all of Kumar (30 images and label maps are 210 MB)


class Source(Protocol):
    """Where a sample's pixels come from: files, memory or a generator. Hashable, so that decoding can be cached."""

    def shape(self) -> tuple[int, int]:
        """Height and width, without decoding pixels where possible."""

    def image(self) -> np.ndarray:
        """(H, W, 3) uint8."""

    def labels(self) -> np.ndarray | None:
        """(H, W) int32, or None."""

    def region(self, row: int, col: int, height: int, width: int) -> np.ndarray:
        """(height, width, 3) uint8."""

    def content(self) -> bytes:
        """What the fingerprint is made of."""

    def stamp(self) -> tuple:
        """What changes when the content changes; what is remembered about the source holds as long as it does."""

    @property
    def labelled(self) -> bool:
        """Whether there is a label map."""

    @property
    def by_region(self) -> bool:
        """Whether `region` costs less than `image`."""


class _Cache:
    """Least recently used arrays up to a number of bytes. The arrays inside are never handed out themselves."""

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self.arrays: OrderedDict[object, np.ndarray] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: object, make: Callable[[], np.ndarray]) -> np.ndarray:
        with self.lock:
            if key in self.arrays:
                self.arrays.move_to_end(key)
                return self.arrays[key]
        array = make()
        with self.lock:
            if key not in self.arrays and array.nbytes <= self.limit:
                self.arrays[key] = array
                self.size += array.nbytes
                while self.size > self.limit:
                    self.size -= self.arrays.popitem(last=False)[1].nbytes
        return array

    def clear(self) -> None:
        with self.lock:
            self.arrays.clear()
            self.size = 0


CACHE = _Cache(CACHE_BYTES)


@dataclass(frozen=True)
class FileSource:
    """An image file with or without an annotation file beside it.

    Attributes
    ----------
    image_path
        Any file that `nucseg.data.images.read_image` reads.
    label_path
        ``.xml`` (Aperio), ``.geojson``/``.json`` (QuPath) or a label image; None for an unlabelled image.
    components
        Take the label file as a binary mask: its 8-connected components are the nuclei (TNBC's official masks).
    decoded
        Fingerprint decoded pixels (the same for every file format) rather than file bytes (cheap for large files).
    """

    image_path: Path
    label_path: Path | None = None
    components: bool = False
    decoded: bool = False

    @property
    def labelled(self) -> bool:
        """Whether there is an annotation file."""
        return self.label_path is not None

    @property
    def by_region(self) -> bool:
        """True of TIFFs and slides."""
        return reads_regions(self.image_path)

    def stamp(self) -> tuple:
        """Times and sizes of the files, so that corrected annotations are read again."""
        return tuple(
            file_stamp(path) for path in (self.image_path, self.label_path) if path is not None and path.exists()
        )

    def shape(self) -> tuple[int, int]:
        """Height and width from the header."""
        return image_shape(self.image_path)

    def image(self) -> np.ndarray:
        """(H, W, 3) uint8."""
        return read_image(self.image_path)

    def region(self, row: int, col: int, height: int, width: int) -> np.ndarray:
        """(height, width, 3) uint8."""
        return read_region(self.image_path, row, col, height, width)

    def labels(self) -> np.ndarray | None:
        """(H, W) int32, checked against the image's size; None without annotation file."""
        if self.label_path is None:
            return None
        shape, suffix = self.shape(), self.label_path.suffix.lower()
        if suffix == ".xml":
            return read_xml(self.label_path, shape)
        if suffix in (".geojson", ".json"):
            return read_geojson(self.label_path, shape)
        labels = read_labels(self.label_path, binary=True if self.components else None)
        if labels.shape != shape:
            raise DataError(
                f"{self.image_path} has {shape[0]} x {shape[1]} pixels (rows x columns), but its label map "
                f"{self.label_path} has {labels.shape[0]} x {labels.shape[1]}; {another_size(shape, labels.shape)}"
            )
        return labels

    def content(self) -> bytes:
        """Digest of the decoded arrays or of the files' bytes."""
        if self.decoded:
            return array_digest(self.image(), self.labels())
        digest = hashlib.sha256()
        for path in (self.image_path, self.label_path):
            if path is not None:
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.digest()


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Arrays that are in memory already: for tests and for users with their own reader."""

    pixels: np.ndarray
    label_map: np.ndarray | None = None
    by_region = True

    def stamp(self) -> tuple:
        """Nothing: arrays are not watched."""
        return ()

    @property
    def labelled(self) -> bool:
        """Whether there is a label map."""
        return self.label_map is not None

    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[:2]

    def image(self) -> np.ndarray:
        """(H, W, 3) uint8."""
        return self.pixels

    def region(self, row: int, col: int, height: int, width: int) -> np.ndarray:
        """(height, width, 3) uint8."""
        return self.pixels[row : row + height, col : col + width]

    def labels(self) -> np.ndarray | None:
        """(H, W) int32, or None."""
        return self.label_map

    def content(self) -> bytes:
        """Digest of the arrays."""
        return array_digest(self.pixels, self.label_map)


def array_digest(image: np.ndarray, labels: np.ndarray | None) -> bytes:
    """SHA-256 over shape, image (H, W, 3) uint8 and, if there is one, label map (H, W)."""
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image))
    if labels is not None:
        digest.update(np.ascontiguousarray(labels, dtype="<i4"))
    return digest.digest()
